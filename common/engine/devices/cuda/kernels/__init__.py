"""What a GPU computes, in Triton: one file per kernel family, and nothing of when it is launched."""
