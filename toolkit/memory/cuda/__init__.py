"""What a CUDA device does that a CPU does not."""
