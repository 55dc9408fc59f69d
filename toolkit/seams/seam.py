"""What a seam is, and the check whether the installed library still has it."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

Kind = Literal["patch", "override", "private", "constant"]
_INSTANCE_ATTRIBUTE = object()  # stands for an attribute that a class gives its instances
_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True, kw_only=True)
class Seam:
    """One place where our code depends on something that a library does not promise to keep.

    Args:
        name: its name in `patched`, tests and reports.
        kind: "patch": we replace it. "override": our class has a method of that name. "private": we read or call it, and it is
            private, or we would not notice if it were missing. "constant": a number, a list, a text or a rule that we copied.
        where: our modules that depend on it, below `toolkit.` (or from `benchmarks.` or `recipes.` on); for an override "module:Class".
        target: "package.module: Name Class.name ...", once for each module. An attribute of instances counts as present if the
            class assigns it to `self` or declares it.
        reason: what we need it for.
        breaks: what goes wrong if it changes.
        silent: whether that happens without an error.
        signature: the parameters that we depend on, without `self`. For a patched function: all, in order; for an operator: the
            first ones, in order; for any other function: some. None: not compared. Overrides are always compared with their
            base; for them these are the parameters of the base that the library passes, None for all.
        called_in: for an override, the module of the library that calls it, by default that of the base; "" for none.
        source: (module or file of the package, regular expression) pairs: texts that must be in the library's source.
        probe: tests the fact; returns what differs, or None.
        checked_by: the test for what neither a source nor a probe on a CPU can show.
        since, until: this holds from version `since` on and before version `until` of `library`. None: no limit.
        library: the package to which `since` and `until` refer; by default that of the first target.
    """

    name: str
    kind: Kind
    where: str | tuple[str, ...]
    reason: str
    breaks: str
    target: str | tuple[str, ...] = ()
    silent: bool = False
    signature: tuple[str, ...] | None = None
    source: tuple[tuple[str, str], ...] = ()
    probe: Callable[[], str | None] | None = None
    called_in: str | None = None
    checked_by: str = ""
    since: str | None = None
    until: str | None = None
    library: str = ""

    @property
    def targets(self) -> list[tuple[str, str]]:
        """The targets as (module, attribute path in it); the path is empty for a whole module."""
        lines = (self.target,) if isinstance(self.target, str) else self.target
        found = []
        for line in lines:
            module, _, names = line.partition(":")
            found += [(module, name) for name in names.split() or [""]]
        return found

    @property
    def places(self) -> tuple[str, ...]:
        """`where` as a tuple."""
        return (self.where,) if isinstance(self.where, str) else self.where

    @property
    def package(self) -> str:
        """The name under which the library is imported and installed."""
        if self.library:
            return self.library
        modules = [module for module, _ in self.targets] or [file for file, _ in self.source]
        return re.split(r"[./]", modules[0])[0]


def applies_to_installed(seam: Seam) -> bool:
    """Whether the seam applies to the installed version: `since` <= version < `until`."""
    try:
        installed = _numbers(version(seam.package))
    except PackageNotFoundError:
        return seam.package == "python"
    since, until = (None if bound is None else _numbers(bound) for bound in (seam.since, seam.until))
    return (since is None or since <= installed) and (until is None or installed < until)


def check(seam: Seam) -> str | None:
    """One line on how the installed library differs from `seam`; None if it does not, or if the seam is for other versions."""
    if not applies_to_installed(seam):
        return None
    if seam.package != "python":
        importlib.import_module(seam.package)
    for module, path in seam.targets:
        try:
            found = find(module, path)
        except LookupError as error:
            return str(error)
        difference = None
        if seam.kind == "override":
            difference = _override_differs(seam, module, path, found)
        elif seam.signature is not None and found is not _INSTANCE_ATTRIBUTE:
            difference = _signature_differs(seam, found)
        if difference:
            return f"{module}:{path} {difference}"
    for file, pattern in seam.source:
        text = text_of(file)
        if text is None:
            return f"{file} is gone"
        if not re.search(pattern, text, re.MULTILINE):
            return f"{file} has no text like {pattern!r} any more"
    return seam.probe() if seam.probe is not None else None


def find(module: str, path: str = "") -> Any:
    """The attribute `path` of `module`, or a placeholder if a class gives it only to its instances.

    Raises: LookupError, with the name that is missing.
    """
    found = _module(module)
    done: list[str] = []
    for name in filter(None, path.split(".")):
        if _has(found, name):
            found = getattr(found, name)
        elif isinstance(found, type) and (name in _annotations(found) or _assigns(found, name)):
            found = _INSTANCE_ATTRIBUTE
        else:
            raise LookupError(f"{module} has no {'.'.join([*done, name])} any more")
        done.append(name)
    return found


def ours(place: str) -> Any:
    """The object at `place` ("module:name", below `toolkit.`), imported by name so that the tables import no module of ours."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"toolkit.{module}"), name)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        parent, _, last = name.rpartition(".")
        if parent and _has(owner := _module(parent), last):
            return getattr(owner, last)
    raise LookupError(f"there is no {name} any more")


def _has(owner: Any, name: str) -> bool:
    try:
        return hasattr(owner, name)
    except Exception:  # a property that fails on the class
        return True


def _annotations(cls: type) -> set[str]:
    return {name for base in cls.__mro__ for name in vars(base).get("__annotations__", {})}


@cache
def _class_source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # a C++ class
        return ""


def _assigns(cls: type, name: str) -> bool:
    """Whether a method of `cls` assigns `self.name`, or `name` of an object that it makes."""
    assigned = re.compile(rf"\b\w+\.{name}\b[^=\n]*(?<![=!<>])=(?!=)")
    return any(assigned.search(_class_source(base)) for base in cls.__mro__)


@cache
def text_of(file: str) -> str | None:
    """The source of a module, by its name and without importing it; or of a file, by its path in its package."""
    if "/" in file:
        package, _, rest = file.partition("/")
        spec = find_spec(package)
        path = Path(spec.submodule_search_locations[0]) / rest if spec and spec.submodule_search_locations else None
    else:
        try:
            spec = find_spec(file)
        except ImportError:
            spec = None
        path = Path(spec.origin) if spec and spec.origin else None
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None


def _parameters(function: Any) -> list[inspect.Parameter] | None:
    """The parameters of a function or, from its schema, of an operator; None for a builtin without a signature."""
    if hasattr(function, "overloads"):  # an operator: its first overload
        function = getattr(function, function.overloads()[0])
    if hasattr(function, "_schema"):
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return [inspect.Parameter(_valid(argument.name), kind) for argument in function._schema.arguments]
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def _valid(name: str) -> str:
    return f"{name}_" if name in ("lambda", "from") else name


def _signature_differs(seam: Seam, function: Any) -> str | None:
    assert seam.signature is not None
    parameters = _parameters(function)
    if parameters is None:
        return "has no readable signature any more"
    is_operator = hasattr(function, "overloads") or hasattr(function, "_schema")
    names = [parameter.name for parameter in parameters if is_operator or parameter.name != "self"]
    wanted = list(seam.signature)
    if is_operator:
        same = names[: len(wanted)] == wanted
    elif seam.kind == "patch":
        same = names == wanted
    else:
        same = set(wanted) <= {*names}
    return None if same else f"takes ({', '.join(names)}), and we need ({', '.join(wanted)})"


def _override_differs(seam: Seam, module: str, path: str, base: Any) -> str | None:
    """How our method differs: it does not accept the calls of its base, or the library does not call it; None if neither."""
    method = path.rpartition(".")[2]
    for place in seam.places:
        cls = ours(place)
        if method not in vars(cls):
            return f"is not overridden by {place}"
        difference = _not_accepted(_parameters(getattr(cls, method)), _parameters(base), seam.signature)
        if difference:
            return f"is called in a way that {place} does not accept: {difference}"
    caller = module if seam.called_in is None else seam.called_in
    if not caller:
        return None
    text = re.sub(rf"\bdef {method}\b", "", text_of(caller) or "")
    return None if re.search(rf"\.{method}\b", text) else f"is not called by {caller} any more"


def _not_accepted(
    own: list[inspect.Parameter] | None, base: list[inspect.Parameter] | None, passed: tuple[str, ...] | None
) -> str | None:
    """Which parameters of `base` (or only those that are `passed`) a method with the parameters `own` does not accept."""
    if own is None or base is None or any(parameter.kind in _ANY for parameter in base):
        return None
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own)
    mine = [parameter for parameter in own if parameter.kind not in _ANY and parameter.name != "self"]
    theirs = [parameter.name for parameter in base if parameter.name != "self"]
    if gone := [name for name in passed or () if name not in theirs]:
        return f"the library has no parameter {', '.join(gone)} any more"
    names = [parameter.name for parameter in mine]
    for number, name in enumerate(theirs if passed is None else passed):
        if name in names and names.index(name) != number:
            return f"{name} is number {number + 1} there, and {names.index(name) + 1} in ours"
        if name not in names and not takes_any:
            return f"the library has the parameter {name}, and ours does not"
    for parameter in mine:
        if parameter.default is inspect.Parameter.empty and parameter.name not in theirs:
            return f"ours needs {parameter.name}, which the library does not pass"
    return None


def _numbers(text: str) -> tuple[int, ...]:
    """2.13.0+cpu as (2, 13, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", text.split("+")[0])[:3])
