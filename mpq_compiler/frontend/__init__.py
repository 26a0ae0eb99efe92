"""Diffusers models as functions of named tensors, and the inputs they are called with."""
