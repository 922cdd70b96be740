"""How engines tell each other: hints that make things fast, never truth."""
