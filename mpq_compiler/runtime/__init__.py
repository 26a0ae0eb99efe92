"""Runs an artifact without torch: on this CPU, a GPU, or a device over the network."""
