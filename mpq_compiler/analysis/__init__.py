"""What a change does to the output, measured or expected."""
