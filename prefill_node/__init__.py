"""The prefill role: computes prompts in batches of chunks and hands their KV off to decode nodes."""
