"""Serving: requests of many clients, batched step by step, behind HTTP, Triton or Ray."""
