"""Footprint: fine-tune language models on consumer GPUs, and know where the memory goes before, during and after."""

__version__ = "0.1.0"
