"""From a recipe and the layouts of its checkpoints to a plan, as plain data. No tensor is read, no file written."""
