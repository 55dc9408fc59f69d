"""How a model is fine-tuned: one file for each method. `METHODS` finds them, so a new method is one file here and one recipe."""

import importlib
import pkgutil
import sys
from types import ModuleType

from toolkit.errors import UserError, did_you_mean
from toolkit.methods.base import Method

__all__ = ["METHODS", "Method", "method_named"]


def _find() -> dict[str, type[Method]]:
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    found = {cls.name: cls for cls in classes if issubclass(cls, Method) and "name" in vars(cls)}
    return dict(sorted(found.items()))


METHODS = _find()


def method_named(name: str) -> type[Method]:
    """The method whose recipe has this name.

    Raises: UserError with the nearest name, and all of them.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{did_you_mean(name, METHODS)}; there are: {', '.join(METHODS)}")
    return METHODS[name]


class _CallablePackage(ModuleType):
    """Makes the package `toolkit.methods` callable, so that `toolkit.methods()` is a function of the Python API."""

    def __call__(self) -> dict[str, type[Method]]:
        """The same as `toolkit.runs.api.methods`."""
        return dict(METHODS)


sys.modules[__name__].__class__ = _CallablePackage
