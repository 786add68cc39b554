"""Which files a merge makes, per output format, and where elements belong in them."""
