"""A GPU by CUDA: its memory and errors, kernels of its own, and steps in a queue that nobody waits for."""
