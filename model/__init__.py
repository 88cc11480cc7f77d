"""The model: its sizes, its steps on the GPU, and the same steps in numpy."""
