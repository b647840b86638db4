"""What captions state: text in, HOI classes out. Knows nothing of models."""
