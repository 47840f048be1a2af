"""From a checkpoint's files to a decoder that a device computes."""
