"""Durable files, locks, and run directories on disk or in object storage."""
