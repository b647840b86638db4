"""Images: where they lie, how they are decoded, and which regions of them are looked at."""
