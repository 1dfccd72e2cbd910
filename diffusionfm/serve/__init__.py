"""Pictures for many at once: the engine that batches requests step by step, and the HTTP API before it."""
