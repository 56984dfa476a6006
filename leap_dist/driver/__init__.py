"""The driver: the only package that uses Ray."""
