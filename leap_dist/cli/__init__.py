"""The command line: entry point, commands, flags, and what they print."""
