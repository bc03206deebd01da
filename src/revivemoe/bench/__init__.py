"""Measurements that a user can repeat: each module's `run` returns its figures and prints a table."""
