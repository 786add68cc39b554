"""Makes a plan, as plain data, from a recipe and the layouts of its checkpoints. Reads no tensor, writes no file."""
