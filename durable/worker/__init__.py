"""Serving steps: what a worker process, or an engine with a transport of its own, does with a task."""
