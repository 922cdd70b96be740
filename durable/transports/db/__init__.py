"""Tasks and results as rows of two tables, on Postgres or SQLite: the queue for whoever has a database and nothing else.

`transport.py` is the transport. Below it: `tables.py` (what both databases do, and the tables' shape), `postgres.py` and
`sqlite.py` (each in its own words), `rows.py` (messages to rows and back), `watch.py` (how an engine's tasks stand).
"""

from durable.transports.db.transport import DbTransport

__all__ = ["DbTransport"]
