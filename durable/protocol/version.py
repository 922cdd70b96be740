"""The version of the wire, of the journal and of the tables. Raised by hand; each raise is told in CHANGELOG.md."""

PROTOCOL_VERSION = 1
"""What workers and runners negotiate."""

SCHEMA_VERSION = 3
"""What a store is stamped with. A store from the future is refused with a sentence."""
