"""Judging networks on real images, in PyTorch or as exported graphs."""
