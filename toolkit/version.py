"""The version of Footprint, which run folders and comparisons keep."""

__version__ = "0.1.0"
