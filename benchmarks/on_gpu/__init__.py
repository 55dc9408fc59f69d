"""The parts of `benchmarks/gpu.py`: what it measures (`runs`, `memory`, `facts`, `speed`, `fits`), and how (`pool`, `results`)."""
