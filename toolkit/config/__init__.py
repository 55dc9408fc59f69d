"""Turns flags and YAML into one checked `Config`, before anything is loaded.

Four flat dataclasses describe a recipe: the method's own, `ModelArguments`, `DataArguments` and `TrainArguments` (all of
Hugging Face's `TrainingArguments`, under its own flag names). Each field is a flag, and a YAML key of the same name.
`--config FILE` reads such a YAML file; flags on the command line win.
"""

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
