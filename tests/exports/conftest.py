"""The labeled run of `labeled_run`."""

from labeled_run import labeled, own_classes

__all__ = ["labeled", "own_classes"]
