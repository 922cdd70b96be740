"""`python -m durable`: the command line where no script was installed."""

from __future__ import annotations

from durable.cli.main import main

main()
