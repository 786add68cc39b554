"""Checkpoints of any number of ranks, in DeepSpeed's form: what merges of large runs are measured with."""
