"""TensorBoard, pictures and the live table."""
