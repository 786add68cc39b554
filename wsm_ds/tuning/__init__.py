"""Tuning: which merge of a run is the best, and how sure the measurements are."""
