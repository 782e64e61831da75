"""Sampling from a bundle: noise, the step over a set of slots, backends, the pipeline. No torch here."""
