"""What a pass and a backend are, and how pipelines of passes are written, found, checked and run."""
