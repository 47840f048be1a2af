"""The prefill role: computes prompts in batches of chunks and hands their KV to decode nodes."""
