"""Finds in source code what belongs into the registry of seams: private names of libraries, patches, overrides, silent reads."""

import ast
import importlib
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT

from toolkit.seams.seam import _assigns

OWN = ("toolkit", "on_gpu", "benchmarks")
OUTSIDE = ("benchmarks", "recipes")  # modules of ours outside toolkit, whose names begin with the folder
DOCUMENTED = {"os._exit"}  # public in spite of its underscore


@dataclass(frozen=True)
class Found:
    """A place in our code that depends on a library: what kind of place, in which line, and the name that it depends on."""

    kind: str
    line: int
    name: str


def modules() -> dict[str, Path]:
    """Our modules by the name that a seam gives them: toolkit's without `toolkit.`, those of benchmarks and the recipes."""
    found = {}
    for path in sorted((ROOT / "toolkit").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "toolkit").with_suffix("").parts)
        if not name.startswith("seams"):
            found[name.removesuffix("__init__").removesuffix(".")] = path
    for folder in OUTSIDE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def _is_library(module: str) -> bool:
    return module.split(".")[0] not in OWN


class _Finder(ast.NodeVisitor):
    """Walks one module; `own` are the names that our own classes have, `cls_of` gives a class of the module by its name."""

    def __init__(self, own: set[str], cls_of: dict[str, type]) -> None:
        self.own, self.cls_of = own, cls_of
        self.found: list[Found] = []
        self.libraries: set[str] = set()  # names that stand for a library's module or object
        self.ours: set[str] = set()  # names that stand for a module of ours
        self.functions: list[set[str]] = [set()]  # names of functions that are defined in the scopes around
        self.bases: list[type] = []  # the libraries' bases of the class around
        self.in_class = False

    def _add(self, kind: str, node: ast.AST, name: str) -> None:
        self.found.append(Found(kind, getattr(node, "lineno", 0), name))

    # ---- imports

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            name = alias.asname or alias.name.split(".")[0]
            (self.libraries if _is_library(alias.name) else self.ours).add(name)
            for part in filter(_is_private, alias.name.split(".")):
                self._add("import", node, part)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if not _is_library(module) or module == "__future__":
            self.ours |= {alias.asname or alias.name for alias in node.names}
            return
        private = any(map(_is_private, module.split(".")))
        for alias in node.names:
            self.libraries.add(alias.asname or alias.name)
            if private or _is_private(alias.name):
                self._add("import", node, alias.name)

    # ---- scopes

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before = self.bases, self.in_class
        cls = self.cls_of.get(node.name)
        self.bases, self.in_class = library_bases(cls) if cls else [], True
        self.generic_visit(node)
        self.bases, self.in_class = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.functions[-1].add(node.name)
        self.functions.append(set())
        libraries = {*self.libraries}
        self.generic_visit(node)
        self.libraries = libraries
        self.functions.pop()

    # ---- what is read

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if _is_private(node.attr) and not self._is_ours(node):
            self._add("private", node, node.attr)
        self.generic_visit(node)

    def _is_ours(self, node: ast.Attribute) -> bool:
        owner, name = node.value, node.attr
        if isinstance(owner, ast.Name) and f"{owner.id}.{name}" in DOCUMENTED:
            return True
        if isinstance(owner, ast.Name) and owner.id in self.ours:
            return True
        if isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super":
            return True  # of an override, which is registered as such
        if isinstance(owner, ast.Name) and owner.id in ("self", "cls") and self.in_class:
            return not any(hasattr(base, name) or _assigns(base, name) for base in self.bases)
        return name in self.own

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func)
        text = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        if called in ("getattr", "hasattr") and text and (called == "hasattr" or len(node.args) == 3):
            if text[0] not in self.own:
                self._add("silent", node, text[0])
        elif called == "patched" and text:
            self._add("patched", node, text[0])
        elif called in ("setattr", "delattr") and self._root(node.args[0]) in self.libraries:
            self._add("patch", node, text[0] if text else ast.unparse(node.args[0]))
        elif called in ("patch.object", "mock.patch.object") and self._root(node.args[0]) not in self.ours:
            self._add("patch", node, text[0] if text else ast.unparse(node.args[1]))
        elif called in ("patch.dict", "patch") and "os.environ" not in ast.unparse(node.args[0]):
            self._add("patch", node, ast.unparse(node.args[0]).split(".")[-1])
        elif called.endswith("Library") and self._root(node.func) in self.libraries:
            self._add("patch", node, "Library")
        self.generic_visit(node)

    # ---- what is written

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            targets = target.elts if isinstance(target, ast.Tuple) else [target]
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value] * len(targets)
            for one, value in zip(targets, values, strict=False):
                self._written(one, value)
        self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            self._written(target, None)
        self.generic_visit(node)

    def _written(self, target: ast.expr, value: ast.expr | None) -> None:
        if isinstance(target, ast.Name):  # another name for something of a library's
            attribute = isinstance(value, ast.Attribute) or (isinstance(value, ast.Name) and value.id in self.libraries)
            if attribute and value is not None and self._root(value) in self.libraries:
                self.libraries.add(target.id)
            return
        if not isinstance(target, ast.Attribute | ast.Subscript):
            return
        owner = target.value
        name = target.attr if isinstance(target, ast.Attribute) else ast.unparse(owner).split(".")[-1]
        root = self._root(owner)
        replaces = self._is_function(value) and root not in {"self", "cls"} | self.ours and not name.startswith("__")
        if root in self.libraries - {*sys.stdlib_module_names} or replaces:
            self._add("patch", target, name)
        elif isinstance(target, ast.Attribute) and _is_self(owner) and self._reads(name):
            self._add("private", target, name)

    def _reads(self, name: str) -> bool:
        """Whether the library's base of the class around reads that attribute, which it may cease to do."""
        return any(re.search(rf"\bself\.{name}\b", _source(base)) for base in self.bases)

    def _is_function(self, value: ast.expr | None) -> bool:
        if isinstance(value, ast.Lambda):
            return True
        if isinstance(value, ast.Call):
            return ast.unparse(value.func) in ("partial", "functools.partial")
        return isinstance(value, ast.Name) and any(value.id in names for names in self.functions)

    @staticmethod
    def _root(node: ast.expr) -> str:
        while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
            node = node.func if isinstance(node, ast.Call) else node.value
        return node.id if isinstance(node, ast.Name) else ""


def library_bases(cls: type) -> list[type]:
    """The classes that `cls` derives from and that are a library's."""
    plain = ("builtins", "abc", "typing", "enum", "dataclasses", "collections.abc")
    return [base for base in cls.__mro__[1:] if _is_library(base.__module__) and base.__module__ not in plain]


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


def classes(module: str) -> dict[str, type]:
    """The classes that a module of toolkit defines, by name."""
    if module.startswith(OUTSIDE):
        return {}
    imported = importlib.import_module(f"toolkit.{module}" if module else "toolkit")
    return {
        name: value
        for name, value in vars(imported).items()
        if isinstance(value, type) and value.__module__ == imported.__name__
    }


def own_names(sources: list[str]) -> set[str]:
    """The names that our classes define, as a method, a field or an attribute that is set on something."""
    names: set[str] = set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.FunctionDef):
                        names.add(item.name)
                    elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        names.add(item.target.id)
                for item in ast.walk(node):
                    if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store) and _is_self(item.value):
                        names.add(item.attr)
    return names


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def find_in(source: str, own: set[str], cls_of: dict[str, type]) -> list[Found]:
    """What of a module's source depends on libraries in a way that must be registered, overrides apart."""
    finder = _Finder(own, cls_of)
    finder.visit(ast.parse(source))
    return finder.found


def overrides_of(cls: type) -> list[tuple[str, type]]:
    """The methods of a library's base that `cls` has too, each with the base: all but dunders, fields and events."""
    found = []
    for name, value in vars(cls).items():
        if (
            name.startswith("__")
            or name in ("_abc_impl", "_backward_cls")
            or not (callable(value) or _is_descriptor(value))
        ):
            continue
        base = next((base for base in library_bases(cls) if name in vars(base)), None)
        if base is not None:
            found.append((name, base))
    return found


def _is_descriptor(value: object) -> bool:
    return isinstance(value, property | staticmethod | classmethod)
