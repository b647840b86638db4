"""Labels that people corrected: read, compared with the machine's, and put in their place."""
