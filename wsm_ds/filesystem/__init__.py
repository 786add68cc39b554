"""What the rest asks of a file system: durable writes, locks, free space, shared blocks, small files, checksums."""
