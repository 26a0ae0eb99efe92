"""What a pass is, and how pipelines of passes are written, found, checked and run."""
