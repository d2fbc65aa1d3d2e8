"""One run: its training, measurement, files, device and processes."""
