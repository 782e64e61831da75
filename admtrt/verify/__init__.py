"""Verification: a bundle against the PyTorch checkpoints that it was exported from, stage by stage."""
