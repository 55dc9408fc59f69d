"""The version of Footprint, which run folders and comparisons record."""

__version__ = "0.1.0"
