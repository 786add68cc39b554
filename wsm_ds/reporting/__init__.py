"""Output of the command line: tables and progress for people, JSON events for programs."""
