"""The Python API: training and evaluation as functions, with callbacks and with errors as exceptions."""
