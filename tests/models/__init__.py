"""Models by name, and their conversion."""
