"""Artifacts timed against baselines, side by side in one run."""
