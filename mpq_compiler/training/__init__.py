"""Training of what is stored against the float model."""
