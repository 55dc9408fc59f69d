"""The first second of a command: its flags, its card and its paths are checked before PyTorch and transformers are imported.

Those imports take 5 seconds on an idle machine. What is accepted here is checked again by the parser of the recipe.
"""

import argparse
import importlib.util
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from toolkit.config import sources
from toolkit.config.hints import refuse_unknown
from toolkit.config.page import short_help
from toolkit.distributed.ranks import exits_cleanly
from toolkit.errors import UserError, check_filled, did_you_mean
from toolkit.errors.numbers import check_numbers
from toolkit.errors.reading import read_yaml

YES, NO = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")  # as transformers reads a switch
LONGEST_NAME = 255  # bytes of a file's or folder's name
LOCK = ".lock"  # in the folder of a run that is being written; see `toolkit.runs.claim`
FILES = re.compile(r"\.(csv|tsv|jsonl?|parquet|txt)(\.(gz|bz2|xz|zip))?$", re.IGNORECASE)
_HUB_PAGE = re.compile(r"((https?://)?(www\.)?(huggingface\.co|hf\.co)/|hf://)\w", re.IGNORECASE)
# What --report_to needs, by its name: modules of which one must be there, and the package to install.
TRACKERS = {
    "azure_ml": (("azureml",), "azureml-sdk"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "dagshub": (("dagshub",), "dagshub mlflow"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}


def start(recipe: str) -> None:
    """What a recipe does first; `recipe` is its file. Prints the help, or one line, or ends with exit code 2 for a mistake.

    A recipe whose file is not named after a method is checked by its parser alone.
    """
    is_first = "torch" not in sys.modules and threading.current_thread() is threading.main_thread()
    if is_first and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during imports is no traceback
    method, argv = Path(recipe).stem, sys.argv[1:]
    if method in sources.methods():
        if wants_short_help(argv) and (text := short_help(method)):
            if _is_main():
                print(text)
            sys.exit(0)
        _or_end(method, argv)
    if _is_main():
        say_start(method)


def say_start(what: str, stream: Any = None) -> None:
    """Prints the first line of a command, where its imports are still to come."""
    if "torch" not in sys.modules:
        say(f"{what}: loading PyTorch and transformers", stream)


def say(text: str, stream: Any = None) -> None:
    """Prints a line as `toolkit.console.say` does, which has to import transformers."""
    print(f"{'footprint':>11}  {text}", file=stream or sys.stdout, flush=True)


def _or_end(method: str, argv: Sequence[str]) -> None:
    try:
        check(method, argv)
    except UserError as error:
        _end(error)


@exits_cleanly
def _end(error: UserError) -> NoReturn:
    """Ends the process as a recipe's own errors do: one line, from the first rank."""
    raise error


def check(method: str, argv: Sequence[str]) -> None:
    """Checks the flags of the recipe for `method`.

    Raises: UserError for an unknown flag or key of --config, a value of the wrong type or range, a flag without effect, a path
        that does not exist, and a tracker that is not installed.
    """
    if {"-h", "--help"}.intersection(argv):
        return
    parser = QuickParser(method)
    given = parser.given(argv)
    if (path := given.get("config")) is not None:
        parser.check_keys(Path(path))
    for name, reason in sources.training_names_without_effect().items():
        if name in given:
            raise UserError(f"--{name} has no effect here: {reason}; leave it out")
    check_filled(given)
    check_numbers(given)
    check_paths(given)
    if not given.get("predict"):
        check_trackers(given.get("report_to"))


class QuickParser(argparse.ArgumentParser):
    """The flags of a recipe, with the types that argparse itself checks; the same errors as `RecipeParser`."""

    def __init__(self, method: str) -> None:
        super().__init__(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self.method = method
        for field in sources.fields_of(method).values():
            self._add(field)
        self.add_argument("--config")
        self.add_argument("--predict", action="store_true")

    def _add(self, field: sources.SourceField) -> None:
        names = [f"--{field.name}"] + ([f"--{field.name.replace('_', '-')}"] if "_" in field.name else [])
        options: dict[str, Any] = {"dest": field.name}
        options |= {name: field.metadata[name] for name in ("nargs", "const", "choices") if name in field.metadata}
        if field.types == {"bool"}:
            options["type"] = _switch
            if field.is_switch:
                options |= {"nargs": "?", "const": True}
        elif "str" not in field.types and field.types <= {"int", "float"} and len(field.types) == 1:
            options["type"] = int if field.types == {"int"} else float
        elif len(field.types) == 1 and (of := re.fullmatch(r"list\[(\w+)\]", next(iter(field.types)))):
            options |= {"nargs": "+", "type": {"int": int, "float": float}.get(of[1], str)}
        elif field.annotation.startswith("Literal[") and field.annotation.endswith("']"):
            options["choices"] = re.findall(r"'(.*?)'", field.annotation)
        if field.name == "resume_from_checkpoint":
            options |= {"nargs": "?", "const": "true"}
        self.add_argument(*names, **options)
        if field.is_switch and field.default is True:
            spelt = (f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}")
            self.add_argument(*spelt, dest=field.name, action="store_false")

    def error(self, message: str) -> NoReturn:
        raise UserError(in_one_spelling(message))

    def given(self, argv: Sequence[str]) -> dict[str, Any]:
        """The settings in `argv`, without defaults."""
        space, rest = self.parse_known_args(list(argv))
        if rest:
            self._refuse_unknown(rest[0], "")
        return vars(space)

    def check_keys(self, path: Path) -> None:
        """Raises UserError for a YAML file that cannot be read, and for a key that is no flag."""
        content = read_yaml(path, f"--config {path}", "the file must hold `flag_name: value` lines", may_be_empty=True)
        for key in content:
            name = str(key).replace("-", "_")
            if name == "config" or not any(name == action.dest for action in self._actions):
                self._refuse_unknown(f"--{name}", f"{path}: ")

    def _refuse_unknown(self, got: str, where: str) -> NoReturn:
        name = got.lstrip("-").split("=")[0].replace("-", "_")
        names = {action.dest for action in self._actions}
        owners = [one for one in sources.methods() if name in sources.own_fields(one)]
        refuse_unknown(got, where, names, sources.training_names_without_effect(), owners)


def in_one_spelling(message: str) -> str:
    """argparse's message, without the second spelling of the flag: `--lora_r/--lora-r: ...` becomes `--lora_r: ...`."""
    return re.sub(r"^(--\w+)/--[\w-]+", r"\1", message.removeprefix("argument "))


def _switch(text: str) -> bool:
    if text.lower() not in (*YES, *NO):
        raise argparse.ArgumentTypeError(
            f"Truthy value expected: got {text} but expected one of yes/no, true/false, t/f, y/n, 1/0 (case insensitive)."
        )
    return text.lower() in YES


def check_paths(given: dict[str, Any]) -> None:
    """Raises UserError for what is surely meant as a path and is not there; names that may be the hub's are left alone."""
    model, data = given.get("model_name_or_path"), given.get("dataset_name")
    if model and _cannot_be_id(model) and not Path(model).expanduser().exists():
        raise UserError(f"--model_name_or_path {model}: no such folder; give an existing one or a hub id (user/name)")
    if data and (_is_path(data) or FILES.search(data)) and "://" not in data and not Path(data).expanduser().exists():
        raise UserError(
            f"--dataset_name {data}: no such folder or file{_beside(Path(data).expanduser())}; give an existing one or a hub id (user/name)"
        )
    config, folder = given.get("config"), given.get("output_dir")
    if not folder or config is not None or "resume_from_checkpoint" in given or given.get("predict"):
        return
    path = Path(folder)
    check_no_file(path)
    # other ranks may begin when rank 0 has written into it; a lock means that a run may be going there
    if _is_main() and path.is_dir() and not (path / LOCK).exists():
        check_empty(path)


def _beside(path: Path) -> str:
    """`" (did you mean alpaca.json?)"`, where the folder of `path` holds a file or folder with nearly its name."""
    with suppress(OSError):
        return did_you_mean(path.name, [one.name for one in path.parent.iterdir()])
    return ""


def check_name(flag: str, path: Path) -> None:
    """Raises UserError for the value of `flag` if no file system takes it: with a zero byte, no text, or too long a name."""
    shown = repr(str(path)[:60])
    try:
        longest = max(len(part.encode()) for part in path.resolve().parts)
        if longest > LONGEST_NAME:
            raise UserError(
                f"{flag} {shown} has a name of {longest:,} bytes, and {LONGEST_NAME} are possible; give another path"
            )
    except (ValueError, OSError, RuntimeError):  # a RuntimeError: a loop of links
        raise UserError(f"{flag} {shown} is no possible path; give one of ordinary characters") from None


def check_no_file(path: Path) -> None:
    """Raises UserError if the run's folder `path` is a file, or no possible path."""
    check_name("--output_dir", path)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path} is a file; give a folder that is new or empty")


def check_empty(path: Path) -> None:
    """Raises UserError if the folder `path` of a new run holds anything."""
    if any(path.iterdir()):
        raise UserError(
            f"--output_dir {path} is not empty; give a new folder, or continue its run with --resume_from_checkpoint true"
        )


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~"))


def _cannot_be_id(name: str) -> bool:
    """Whether the model `name` can be a folder alone: as a hub id it has too many parts, and it is no page of the hub."""
    has_scheme_or_parts = "://" in name or len([*filter(None, name.split("/"))]) > 2
    return _is_path(name) or (has_scheme_or_parts and not _HUB_PAGE.match(name))


def check_trackers(names: Any) -> None:
    """Raises UserError for trackers of `--report_to` that are unknown or not installed; `all` means those that are."""
    for name in [names] if isinstance(names, str) else names or ():
        if name in ("all", "none", ""):
            continue
        if name not in TRACKERS:
            raise UserError(f"--report_to {name} is not known; there are {', '.join(sorted(TRACKERS))}, all and none")
        modules, package = TRACKERS[name]
        if not any(is_installed(module) for module in modules):
            raise UserError(
                f"--report_to {name}: {package.split()[0]} is not installed; pip install {package}, or leave it out"
            )


def is_installed(module: str) -> bool:
    """Whether `module` could be imported; it is not."""
    return importlib.util.find_spec(module) is not None


def wants_short_help(argv: Sequence[str]) -> bool:
    """Whether `--help` is among the flags, and not `--help all`."""
    at = next((number for number, word in enumerate(argv) if word in ("-h", "--help")), None)
    return at is not None and [*argv[at + 1 : at + 2]] != ["all"]


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
