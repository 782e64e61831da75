"""Run plans: open them, bind them to GPU memory, and enqueue steps without waiting for the host."""
