"""What the kit runs on the machine with the GPU: python3, NumPy and what the kit carries; torch where it compares."""
