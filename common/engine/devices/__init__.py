"""What a device must be able to do for the model, and the devices that can."""
