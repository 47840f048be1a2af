"""The engine's host side: decides, keeps the books, computes nothing."""
