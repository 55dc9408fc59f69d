"""Turns flags and YAML into one checked `Config`, before anything is loaded.

Four flat dataclasses describe a recipe: the method's own, `ModelArguments`, `DataArguments` and `TrainArguments` (all of
Hugging Face's `TrainingArguments`, under its own flag names). Each field is a flag, and a YAML key of the same name.
`--config FILE` reads such a YAML file; flags on the command line win. The names below are imported when they are used, because
`toolkit.config.start` must not wait for transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.config.arguments import TrainArguments
    from toolkit.config.parser import Flags, RecipeParser, read_flags
    from toolkit.config.resolved import Config, choose_precision, configure, new_output_dir, parse_config

__all__ = [
    "Config",
    "Flags",
    "RecipeParser",
    "TrainArguments",
    "choose_precision",
    "configure",
    "new_output_dir",
    "parse_config",
    "read_flags",
]

# The module of each name above (PEP 562).
_HOMES = {"TrainArguments": "arguments", "Flags": "parser", "RecipeParser": "parser", "read_flags": "parser"}

if not TYPE_CHECKING:  # with __getattr__, a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'resolved')}"), name)
