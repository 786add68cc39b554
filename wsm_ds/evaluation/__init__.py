"""Evaluations: one metric of one model, measured on what is stated, kept in a file that only grows."""
