"""Atari: the emulator, and which games there are."""
