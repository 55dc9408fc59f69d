"""The packages: those of toolkit/, and recipes/ and launch/, which an installed toolkit has inside (see pyproject.toml)."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["toolkit*"]), "toolkit.recipes", "toolkit.launch", "toolkit.launch.deepspeed"])
