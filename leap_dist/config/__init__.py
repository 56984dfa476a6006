"""Settings: what can be configured, checked and read from flags and files."""
