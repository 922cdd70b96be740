"""Runs on PostgreSQL."""
