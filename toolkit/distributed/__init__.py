"""Training on several processes: the requested engine, the running engine, and functions that all ranks call together."""
