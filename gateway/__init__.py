"""The HTTP side of pdq: from a client's request to token ids and back to text. No torch here."""
