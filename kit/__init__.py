"""Machinery that knows no paper: processes and devices, files, checkpoints, and the sources of the data sets."""
