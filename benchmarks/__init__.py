"""Measurements: plain commands that print what they measured."""
