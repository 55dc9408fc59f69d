"""Data sets: reads them from files or the hub, and turns them into rows of token ids."""
