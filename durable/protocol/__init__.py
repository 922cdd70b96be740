"""The words every floor and every language shares: states, messages, codec, version."""
