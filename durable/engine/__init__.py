"""The engine: takes runs, drives their machines, makes what happened durable, and does what they ask for.

start -> scheduler -> executor -> core/replay + core/ctx -> apply -> committer; what comes back goes through resume.
"""
