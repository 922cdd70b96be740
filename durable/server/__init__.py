"""The service: the HTTP API, its streams, and what stands before them. Floor 8; needs the extra `service`."""
