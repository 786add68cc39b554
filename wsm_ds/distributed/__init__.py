"""Several processes on one operation (a merge, a training attempt): barriers, decisions, errors that reach every rank.

It imports torch only where there are several processes.
"""
