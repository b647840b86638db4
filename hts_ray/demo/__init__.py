"""The built-in world, and the demo that runs every stage on it."""
