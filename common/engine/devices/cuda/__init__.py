"""A GPU by CUDA: its memory, its errors. It has no kernels of its own yet, and takes the reference's."""
