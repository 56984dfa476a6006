"""Messages that pass between the server and its workers."""
