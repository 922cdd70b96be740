"""PostgreSQL: the store for production, and a private server for development."""

from durable.store.postgres.store import PostgresStore

__all__ = ["PostgresStore"]
