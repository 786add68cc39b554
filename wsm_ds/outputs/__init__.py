"""Which files an output has, and where its elements lie in them."""
