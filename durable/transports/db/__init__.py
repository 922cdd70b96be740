"""Tasks and results as rows of two tables, on Postgres or SQLite: the queue for whoever has a database and nothing else."""

from durable.transports.db.transport import DbTransport

__all__ = ["DbTransport"]
