"""Data sets: read from files or the hub, and made into rows of token ids."""
