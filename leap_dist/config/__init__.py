"""Settings: their declarations, presets, validation, and reading from flags and YAML files."""
