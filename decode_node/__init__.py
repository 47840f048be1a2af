"""The decode role: continuous batching of sequences that arrive with their KV; also unified."""
