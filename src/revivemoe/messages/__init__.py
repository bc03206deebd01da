"""What the engine and its ranks say to each other: typed, never pickled."""
