"""Runners: processes of an app that run its workflows outside the engine, pass by pass."""
