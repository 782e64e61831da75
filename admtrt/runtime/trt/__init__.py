"""Plans at work: opened, bound to memory of the GPU, and stepped without waiting for the host."""
