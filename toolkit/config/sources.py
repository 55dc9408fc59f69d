"""The flags as the source files of their classes declare them: importing the classes takes seconds, reading the files does not."""

import ast
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_TOOLKIT = Path(__file__).resolve().parents[1]
MODEL, DATA, TRAINING = (_TOOLKIT / name for name in ("models/arguments.py", "data/loading.py", "config/arguments.py"))
ROWS = ("dataset_name", "dataset_config_name", "encoding", "max_eval_samples", "num_beams")


@dataclass(frozen=True)
class SourceField:
    """One field of a dataclass. `default` and `metadata` hold what is a literal in the source."""

    name: str
    annotation: str
    default: Any
    metadata: dict[str, Any]

    @property
    def types(self) -> set[str]:
        """`{"int"}` for `int | None`; of `str` and one other type that other type, as transformers chooses."""
        found = self.annotation.split(" | ")
        return {*found} - ({"str"} if "None" not in found and len(found) == 2 else {"None"})

    @property
    def is_switch(self) -> bool:
        """Whether the flag may stand without a value."""
        return "bool" in self.types and len(self.types) == 1 and self.default is not None


def fields_of(method: str) -> dict[str, SourceField]:
    """The flags of the recipe for `method`, by name: its own, and those of model, data and training."""
    return own_fields(method) | _common()


def methods() -> list[str]:
    """The names of all methods."""
    return sorted(_methods())


@cache
def own_fields(method: str) -> dict[str, SourceField]:
    """The flags of `method` alone."""
    everything = _method_classes()
    return _fields(_methods()[method], everything)


def rows_flags() -> list[str]:
    """The flags that choose rows and columns of a data set."""
    names = _fields(_classes(DATA)["DataArguments"], {})
    return [name for name in names if name.endswith("_column") or name in ROWS]


def training_names_without_effect() -> dict[str, str]:
    """`toolkit.config.arguments.OVERRIDDEN`."""
    for node in _parsed(TRAINING).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OVERRIDDEN":
            return ast.literal_eval(node.value)
    return {}


@cache
def _common() -> dict[str, SourceField]:
    library = importlib.util.find_spec("transformers")  # does not import it
    theirs = Path(str(library and library.origin)).parent / "training_args.py"  # TrainingArguments
    classes = {name: node for file in (theirs, MODEL, DATA, TRAINING) for name, node in _classes(file).items()}
    found: dict[str, SourceField] = {}
    for name in ("ModelArguments", "DataArguments", "TrainArguments"):
        found |= _fields(classes[name], classes)
    return found


@cache
def _method_classes() -> dict[str, ast.ClassDef]:
    files = sorted((_TOOLKIT / "methods").glob("*.py"))
    return {name: node for file in files for name, node in _classes(file).items()}


@cache
def _methods() -> dict[str, ast.ClassDef]:
    """The classes of the methods, by the value of their class variable `name`."""
    return {
        ast.literal_eval(line.value): node
        for node in _method_classes().values()
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and ast.unparse(line.target) == "name"
        and isinstance(line.value, ast.Constant)
    }


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _classes(file: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _parsed(file).body if isinstance(node, ast.ClassDef)}


def _fields(node: ast.ClassDef, known: dict[str, ast.ClassDef]) -> dict[str, SourceField]:
    found: dict[str, SourceField] = {}
    for base in map(ast.unparse, node.bases):
        if base in known:
            found |= _fields(known[base], known)
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        annotation, value = ast.unparse(line.annotation), line.value
        options = {one.arg: one.value for one in value.keywords} if isinstance(value, ast.Call) else {"default": value}
        if "ClassVar" in annotation or _literal(options.get("init")) is False:
            continue
        metadata = options.get("metadata")
        pairs = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
        found[line.target.id] = SourceField(
            line.target.id,
            annotation,
            _literal(options.get("default")),
            {str(_literal(key)): text for key, one in pairs if (text := _literal(one)) is not None},
        )
    return found


def _literal(node: ast.expr | None) -> Any:
    """The value of `node`; None if it is none, or no literal."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
