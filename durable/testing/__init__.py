"""What authors and adapters test with: suites every adapter passes, faults, a harness with a clock that can be set."""
