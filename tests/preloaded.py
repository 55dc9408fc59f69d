"""Imported by the fork server of `reliability`."""

from reliability import preload

preload()
