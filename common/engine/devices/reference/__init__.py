"""Plain torch, on any device: what the fast ones are compared with."""
