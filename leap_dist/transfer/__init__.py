"""An evaluation's results: runs as files, what they say when put together, and the report of it."""
