"""Durable writes, locks, free space, reflinks, small text files, checksums."""
