"""From noise to image in NumPy: schedulers, the loop, conditions and text."""
