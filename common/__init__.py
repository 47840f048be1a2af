"""The contract floor of pdq and, below it, the engine and the node runtime."""
