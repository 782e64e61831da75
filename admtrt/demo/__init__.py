"""The demonstration: the whole way from real images to judged samples, with a report."""
