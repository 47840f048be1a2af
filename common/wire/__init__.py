"""What gateways and nodes say to each other, and how: messages, their bytes, the bus."""
