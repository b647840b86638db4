"""Unlabeled images and a class list in, a fast multi-label classifier out, on Ray."""

__version__ = "0.1.0"
