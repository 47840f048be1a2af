"""`pdq distill`: a draft model for a given target, learned from the target's own text. See README.md."""
