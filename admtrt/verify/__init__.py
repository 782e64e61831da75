"""Verification: compare a bundle with the PyTorch checkpoints that it was exported from, in stages."""
