"""Guides as graphs: losses of the predicted x_0 or of x_t, and second networks."""
