"""Captioners of transformers: families, loading, and how their inputs are prepared."""
