"""The present membership, and the way to the next one. Read `epochs` first."""
