"""The engine on one GPU against the limits of that GPU, and beside transformers."""
