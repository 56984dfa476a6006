"""Leap meta-learning of Atari initializations, as a service on Ray."""

__version__ = "0.1.0"
