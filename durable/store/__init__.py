"""Where runs live: one contract, a shelf of stores."""
