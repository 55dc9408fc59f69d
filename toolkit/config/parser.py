"""Reads the command line and YAML files into `Flags`: typed values by flag name, without defaults."""

import dataclasses
import json
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

import toolkit.methods as methods
from toolkit.config import help
from toolkit.config.arguments import NEWEST, OVERRIDDEN, TrainArguments
from toolkit.config.hints import refuse_unknown
from toolkit.config.start import in_one_spelling
from toolkit.data.loading import DataArguments
from toolkit.errors import UserError
from toolkit.errors.reading import read_yaml
from toolkit.models.arguments import ModelArguments


@dataclass(frozen=True)
class Flags:
    """The settings that a user gives, by flag name, with values of the flags' types; without defaults."""

    given: Mapping[str, Any]  # on the command line
    from_file: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # in the YAML file; `given` wins
    predict: bool = False  # show the predicted memory instead of training


def read_flags(method: type[methods.Method], argv: Sequence[str] | None = None) -> Flags:
    """The flags of the recipe for `method` on the command line, and those of its `--config FILE`.

    Raises: UserError for an unknown flag or key, a missing or a mistyped value, and a file that cannot be read.
    """
    parser = RecipeParser(method, description=sys.modules[method.__module__].__doc__)
    given = parser.given(sys.argv[1:] if argv is None else argv)
    predict, path = given.pop("predict", False), given.pop("config", None)
    return Flags(given, _from_yaml(parser, Path(path)) if path is not None else {}, predict)


class RecipeParser(HfArgumentParser):
    """Hugging Face's parser, with one-line errors instead of a usage page, and without abbreviated flags."""

    def __init__(self, method: type[methods.Method], **kwargs: Any) -> None:
        kwargs = {"allow_abbrev": False, "add_help": False} | kwargs
        super().__init__([method, ModelArguments, DataArguments, TrainArguments], **kwargs)
        self.method = method
        self.add_argument("-h", "--help", action=help.HelpAction)
        self.add_argument("--config", metavar="FILE", help="YAML file whose keys are these flags; flags here win.")
        next(a for a in self._actions if a.dest == "resume_from_checkpoint").__dict__ |= {"nargs": "?", "const": NEWEST}
        self.add_argument("--predict", action="store_true", help="Show what memory the run will need, and do not run.")

    def error(self, message: str) -> NoReturn:
        raise UserError(in_one_spelling(message))

    def given(self, argv: Sequence[str], where: str = "") -> dict[str, Any]:
        """The settings in `argv`, as field name to typed value, without defaults.

        Raises: UserError for an unknown flag (with the nearest valid one), a missing or a mistyped value.
        """
        marker = object()
        names = {action.dest for action in self._actions if action.dest is not SUPPRESS}
        try:
            space, rest = self.parse_known_args(list(argv), Namespace(**dict.fromkeys(names, marker)))
        except UserError as error:
            raise UserError(f"{where}{error}") from None
        if rest:
            self._refuse_unknown(rest[0], where)
        return {name: value for name, value in vars(space).items() if value is not marker}

    def flags(self) -> dict[str, Any]:
        """Flag name (without dashes) to its argparse action."""
        return {
            option.lstrip("-"): action
            for action in self._actions
            for option in action.option_strings
            if "_" in option or "-" not in option[2:]
        }

    def _refuse_unknown(self, got: str, where: str) -> NoReturn:
        name = got.lstrip("-").split("=")[0].replace("-", "_")
        owners = [m for m, cls in sorted(methods.METHODS.items()) if name in {f.name for f in dataclasses.fields(cls)}]
        refuse_unknown(got, where, self.flags(), OVERRIDDEN, owners)


def _from_yaml(parser: RecipeParser, path: Path) -> dict[str, Any]:
    """The settings of a YAML file. Each is parsed as the flag of its name, so the same type checks apply."""
    content = read_yaml(path, f"--config {path}", "the file must hold `flag_name: value` lines", may_be_empty=True)
    given: dict[str, Any] = {}
    flags = parser.flags()
    where = f"{path}: "
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in flags or name in ("config", "help", "h"):
            parser._refuse_unknown(f"--{name}", where)
        if value is None:
            continue  # as if the key were not there
        # a run's own config.yaml has a list; the flag takes one value
        if name == "report_to" and isinstance(value, list):
            given[name] = [str(one) for one in value]
            continue
        given |= parser.given(_as_argv(name, value, flags[name], where), where)
    return given


def _as_argv(name: str, value: Any, action: Any, where: str) -> list[str]:
    takes_list = action.nargs == "+"
    if isinstance(value, list):
        if not takes_list:
            raise UserError(f"{where}{name} takes one value, got a list of {len(value)}")
        return [f"--{name}", *map(str, value)]
    if isinstance(value, dict):
        if name not in TrainingArguments._VALID_DICT_FIELDS:
            raise UserError(
                f"{where}{name} takes one value, got a mapping with {', '.join(map(str, value)) or 'no keys'}"
            )
        return [f"--{name}", json.dumps(value)]
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}"]
