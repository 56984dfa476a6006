"""Fault injection and evidence for tests."""
