"""Measurements that a user can repeat: `run` returns figures, prints a table."""
