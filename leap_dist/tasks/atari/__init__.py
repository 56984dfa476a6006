"""A2C on Atari games."""
