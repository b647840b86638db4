"""Files by path or URI, the tables that join the stages, and the run directory they lie in."""
