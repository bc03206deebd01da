"""`bench soak`: hours of load and faults of every kind, and nothing may be lost or grow."""
