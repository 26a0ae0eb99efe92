"""The plan of kernel calls, and its rewrites."""
