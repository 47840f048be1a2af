"""What a model's folder says, read whole, in one place, for gateway and nodes alike."""
