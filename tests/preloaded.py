"""Imported by the process that forks for `reliability`."""

from reliability import preload

preload()
