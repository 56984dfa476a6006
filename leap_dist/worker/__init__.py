"""The worker: one task from its lease to its final contribution."""
