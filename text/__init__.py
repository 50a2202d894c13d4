"""Tokens and what they spell."""
