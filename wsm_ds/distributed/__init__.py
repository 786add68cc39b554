"""Several processes on one task: who takes part, barriers, decisions, and errors that reach every rank."""
