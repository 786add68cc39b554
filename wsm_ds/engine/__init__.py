"""A plan becomes bytes: the only arithmetic and the only large reads and writes of the project."""
