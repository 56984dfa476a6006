"""Kinds of tasks: Atari games and image data sets."""
