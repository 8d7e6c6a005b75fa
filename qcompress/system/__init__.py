"""Files, locks, the cache, memory, signals, the terminal, this machine. Standard library, rich and numpy."""
