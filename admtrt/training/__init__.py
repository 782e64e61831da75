"""Training: data, losses, averaging, and the loop that the three networks share."""
