"""Several processes on one task: who takes part, barriers, decisions, and errors that reach every rank.

Importing it imports no torch; only a task of several processes does.
"""
