"""What every node shares: one engine, one bus, one queue, and a role on top."""
