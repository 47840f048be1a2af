"""What lies in Redis: every key, every script, and what is read and written by them."""
