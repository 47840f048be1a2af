"""The CPU: oneDNN products, kernels of our own in numba, on torch's threads."""
