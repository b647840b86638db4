"""Scoring prompts and writing captions with a loaded captioner."""
