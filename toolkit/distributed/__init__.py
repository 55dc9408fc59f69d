"""Several processes: what was requested of the launcher, what runs, and what one rank does for all."""
