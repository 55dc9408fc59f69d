"""Flags and YAML become one checked `Config`, before anything is loaded.

A recipe is described by four flat dataclasses: its method's own, `ModelArguments`, `DataArguments` and `TrainArguments`
(all of Hugging Face's `TrainingArguments`, by its own flag names). Each field is a flag and a YAML key of the same name.
`--config FILE` reads YAML whose keys are flags; flags on the command line win.
"""

from toolkit.config.arguments import TrainArguments
from toolkit.config.parser import Flags, RecipeParser, read_flags
from toolkit.config.resolved import Config, choose_precision, configure, parse_config

__all__ = [
    "Config",
    "Flags",
    "RecipeParser",
    "TrainArguments",
    "choose_precision",
    "configure",
    "parse_config",
    "read_flags",
]
