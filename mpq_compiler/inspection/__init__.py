"""Reads what a compilation left behind: dumps, decisions, scores."""
