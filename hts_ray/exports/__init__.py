"""Labels of a run in the formats of other tools, one module a format."""
