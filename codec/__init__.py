"""The entropy code: floats to integers to bits and back. Pure numpy, without files or GPU."""
