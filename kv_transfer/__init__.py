"""Moving KV between nodes: both ends of the handoff protocol, leases, handshake and transports."""
