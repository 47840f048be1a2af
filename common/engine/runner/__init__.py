"""The engine's device side: computes what it is told."""
