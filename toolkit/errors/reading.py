"""Reads YAML and JSON from outside: files of flags, run folders, launch files, models. What could be endless has a limit."""

import json
import math
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolkit.errors import UserError, words_of

# Far above what such files hold: a run's config.yaml has 5 KB, the index of the largest checkpoints 10 MB.
LARGEST_YAML, LARGEST_JSON = 256 * 2**10, 32 * 2**20
DEEPEST = 50  # levels of lists and mappings
LONGEST_INTEGER = 40  # digits
AGAIN = "give a whole, regular file"


class _Refused(ValueError):
    """What a file must not hold; the text continues `FILE: `."""


def read_text(path: Path, what: str = "", largest: int = LARGEST_JSON, remedy: str = AGAIN) -> str:
    """The text of a regular file. `what` names it in messages, for instance with its flag (default: its path).

    Raises: UserError for a file that is missing, a folder, a pipe or a device, too large, or no UTF-8.
    """
    what = what or str(path)
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise UserError(f"{what}: cannot be read (it is a folder); {remedy}")
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{what}: cannot be read (it is a pipe or a device, which may have no end); {remedy}")
        if found.st_size > largest:
            raise UserError(
                f"{what}: cannot be read (it has {found.st_size:,} bytes, more than the {largest:,} of any such file); {remedy}"
            )
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # a ValueError: no UTF-8, or a path with a zero byte
        reason = error.strerror if isinstance(error, OSError) and error.strerror else words_of(error)
        raise UserError(f"{what}: cannot be read ({reason}); {remedy}") from None


def stands_for_another(begin: bytes) -> tuple[str, str] | None:
    """What a file with these first bytes is instead of what its name says, and the remedy: a Git LFS pointer or a web page."""
    if begin.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself", "git lfs pull fetches it"
    if begin.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, not the file itself", "download the file"
    return None


def read_json(
    path: Path, what: str = "", remedy: str = AGAIN, finite: bool = True, duplicates: bool = False
) -> dict[str, Any]:
    """The object in a JSON file. NaN and infinity are refused unless not `finite`, and keys that occur twice without `duplicates`.

    Raises: UserError as `read_text` does, for a file that is no JSON, nested too deeply, or that holds no object.
    """

    def number(text: str) -> float:
        value = float(text)
        if finite and not math.isfinite(value):
            raise _Refused(f"it holds the number {text[:20]}")
        return value

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs) and not duplicates:
            names = [name for name, _ in pairs]
            raise _Refused(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
        return made

    def parse(text: str) -> Any:
        return json.loads(
            text, parse_int=_integer, parse_float=number, parse_constant=number, object_pairs_hook=mapping
        )

    return _parsed(path, what, "JSON", parse, remedy, LARGEST_JSON)


def read_yaml(path: Path, what: str = "", remedy: str = AGAIN, may_be_empty: bool = False) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file. Aliases are refused, as they can expand without end, and `1:30`, which YAML reads as 90.

    Raises: UserError as `read_json` does.
    """
    return _parsed(path, what, "YAML", _yaml, remedy, LARGEST_YAML, may_be_empty)


def _parsed(
    path: Path,
    what: str,
    form: str,
    parse: Callable[[str], Any],
    remedy: str,
    largest: int,
    may_be_empty: bool = False,
) -> dict[str, Any]:
    what = what or str(path)
    text = read_text(path, what, largest, remedy)
    try:
        content = parse(text)
        _check_depth(content)
    except _Refused as error:
        raise UserError(f"{what}: {error}; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}: not valid {form} ({words_of(error)}){_looks_like(text)}; {remedy}") from None
    except Exception as error:  # yaml's own, and what its constructors let through
        raise UserError(f"{what}: not valid {form} ({' '.join(str(error).split())[:200]}); {remedy}") from None
    if content is None and may_be_empty:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{what}: it holds a {type(content).__name__}, not names with values; {remedy}")
    return content


def _looks_like(text: str) -> str:
    """What a file that should be JSON seems to be."""
    if text.startswith("version https://git-lfs"):
        return ": it is a Git LFS pointer, not the file itself (git lfs pull fetches it)"
    if text.lstrip()[:100].lower().startswith(("<!doctype", "<html")):
        return ": it is a web page, not the file itself"
    return ": it is empty" if not text.strip() else ""


def _check_depth(content: Any) -> None:
    level, depth = [content], 0
    while level := [
        value
        for one in level
        if isinstance(one, dict | list)
        for value in (one.values() if isinstance(one, dict) else one)
    ]:
        depth += 1
        if depth > DEEPEST:
            raise _Refused(f"it is nested in more than {DEEPEST} levels")


def _integer(text: str) -> int:
    if len(text) > LONGEST_INTEGER:
        raise _Refused(f"it holds an integer of {len(text)} digits")
    return int(text)


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _Refused(f"the key {key.value!r} occurs twice")
                seen.add(key.value)
        return loader.construct_mapping(node, deep=True)

    def number(loader: Any, node: Any) -> Any:
        value = node.value.replace("_", "").lstrip("+-")
        if ":" in value:
            raise _Refused(f"{node.value} would be read as a number of base 60; write the number, or quote the text")
        if re.fullmatch("0[0-9]+", value):
            raise _Refused(f"{node.value} would be read as a number of base 8; leave out the leading zero, or quote it")
        if node.tag.endswith(":float"):
            return loader.construct_yaml_float(node)
        if len(value) > LONGEST_INTEGER:
            raise _Refused(f"it holds an integer of {len(value)} digits")
        return loader.construct_yaml_int(node)

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", number)
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):  # no recursion yet
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise _Refused(f"it is nested in more than {DEEPEST} levels")
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(f"*{event.anchor} is an alias; write the value out")
    return yaml.load(text, Loader=Loader)


def check_regular(path: Path, what: str = "", remedy: str = AGAIN) -> None:
    """Raises UserError if there is something at `path` that is neither a regular file nor a folder: reading it might not end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{what or path}: it is a pipe or a device, which may have no end; {remedy}")


def check_shape(content: Any, shape: Any, what: str, remedy: str, name: str = "") -> None:
    """Raises UserError for the first value in `content` that is not of the `shape` that our own files have.

    A shape is a type (`float` also takes whole numbers), None, a tuple of shapes (any of them), `[shape]` (a list of any
    length), `{str: shape}` (any names), or a mapping of names to shapes, where a name that ends in ? may be missing.
    """
    if isinstance(shape, dict) and isinstance(content, dict):
        for key, inner in shape.items():
            if key is str:
                for each, value in content.items():
                    check_shape(value, inner, what, remedy, f"{name}.{each}")
            elif key.removesuffix("?") in content:
                check_shape(content[key.removesuffix("?")], inner, what, remedy, f"{name}.{key.removesuffix('?')}")
            elif not key.endswith("?"):
                raise UserError(f"{what}: it has no {f'{name}.{key}'.lstrip('.')!r}; {remedy}")
    elif isinstance(shape, list) and isinstance(content, list | tuple):
        for number, value in enumerate(content):
            check_shape(value, shape[0], what, remedy, f"{name}[{number}]")
    elif not _is_of(content, shape):
        shown = f"{str(content)[:40]!r}" if isinstance(content, str | int | float) else f"a {type(content).__name__}"
        raise UserError(f"{what}: {name.lstrip('.')} is {shown}, not {_named(shape)}; {remedy}")


def _is_of(content: Any, shape: Any) -> bool:
    if isinstance(shape, tuple):
        return any(_is_of(content, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(content, list) and all(_is_of(one, shape[0]) for one in content)
    if shape is None or not isinstance(shape, type):
        return content is shape
    if isinstance(content, bool):
        return shape is bool
    return isinstance(content, int | float) if shape is float else isinstance(content, shape)


def _named(shape: Any) -> str:
    if isinstance(shape, tuple):
        return " or ".join(_named(one) for one in shape)
    if isinstance(shape, list) and shape[0] in (int, [int]):
        return "a list of whole numbers" if shape[0] is int else "a list of lists of whole numbers"
    if isinstance(shape, list | dict) or shape in (list, dict):
        return "a list" if isinstance(shape, list) or shape is list else "names with values"
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", None: "null"}
    return names[shape]
