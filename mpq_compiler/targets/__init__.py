"""What a machine can do: CPUs and GPUs by name, their features and numerics, and what a backend is."""
