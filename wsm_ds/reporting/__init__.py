"""What people and machines are shown: tables, progress, events."""
