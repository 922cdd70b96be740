"""How a step travels to a worker and back: one contract, a shelf of transports."""
