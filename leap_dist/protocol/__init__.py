"""Messages between server and workers, the task queue, quantization, and validation of plain data."""
