"""Runs in Postgres, and a private Postgres for who has none."""
