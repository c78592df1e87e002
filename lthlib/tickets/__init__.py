"""Tickets: descriptions of trained networks, how one is obtained, and what it answers."""
