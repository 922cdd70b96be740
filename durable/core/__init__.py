"""The pure part: definitions, values, keys, the journal, the workflow's own loop, replay. No I/O, no thread, no clock."""
