"""The files that a merge makes, for each output format, and where elements belong in them."""
