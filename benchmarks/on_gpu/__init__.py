"""The parts of `benchmarks/gpu.py`: the measurements (`runs`, `memory`, `facts`, `speed`, `fits`), and `pool` and `results`."""
