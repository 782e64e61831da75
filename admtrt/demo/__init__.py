"""The demo: the complete workflow from real images to judged samples, with a report."""
