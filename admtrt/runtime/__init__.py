"""Sampling from a bundle: noise, the step over a set of slots, backends, and the pipeline. No torch."""
