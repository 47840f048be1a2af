"""Streams of tokens between nodes and a gateway over a virtual network, in virtual time."""
