"""Build feature networks: Inception from its weights, a judge by training."""
