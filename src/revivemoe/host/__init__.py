"""What this process may use of its host: memory, cores, descriptors, a place for files."""
