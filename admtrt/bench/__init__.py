"""Measure speed, memory and parity of every way to run a bundle, side by side in one run."""
