"""A folder that tells on a machine with a GPU, in minutes, what our kernels are there: right, and how fast."""
