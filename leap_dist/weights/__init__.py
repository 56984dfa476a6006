"""Initializations as files, and their export to other libraries."""
