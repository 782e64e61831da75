"""Builders of the networks whose features judge samples: Inception from its weights, a judge by training."""
