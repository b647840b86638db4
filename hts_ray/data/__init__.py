"""Where images and their annotations come from."""
