"""The source of a function with all that it needs, so that a program can hold it: for kernels of the user's.

Functions, classes, Triton kernels and plain values of the user's modules are written out; torch, Triton, graphopt and
what comes with Python is imported.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from graphopt import program

_IMPORTED = frozenset((*sys.stdlib_module_names, "torch", "triton", "graphopt", "numpy"))
_PLAIN = (int, float, str, bool, type(None), tuple, torch.dtype, torch.device)
_TAKEN = frozenset(("before", "after", "inputs", "graph", "strided", "constants", "torch", "operator"))


class Unwritable(Exception):
    """A function needs something that has no source: a tensor, an open file, a function typed into a console."""


def source(function: Callable[..., Any]) -> str:
    """A piece of a program that defines `function`, without its decorators, and all that it refers to.

    Raises Unwritable, naming what has no source.
    """
    writer = _Writer()
    writer.define(function.__name__, function, decorated=False)
    return "\n\n".join(["\n".join(writer.imports), *writer.parts]).strip("\n") + "\n"


class _Writer:
    """The pieces in the order in which they must stand, each once."""

    def __init__(self) -> None:
        self.imports: list[str] = []
        self.parts: list[str] = []
        self._known: dict[str, Any] = {}

    def define(self, name: str, value: Any, *, decorated: bool = True) -> None:
        if name in self._known:
            if self._known[name] is not value:
                raise Unwritable(f"two things are called {name}")
            return
        self._known[name] = value
        origin = self._import_of(name, value)
        if origin:
            self.imports.append(origin)
            return
        if name in _TAKEN:
            raise Unwritable(f"the name {name} is taken")
        inner = getattr(value, "fn", value)  # what triton.jit decorates
        if isinstance(inner, (types.FunctionType, type)):
            text = _source(name, inner, decorated)
            for needed, known in _needed(text, inner):
                self.define(needed, known)
            self.parts.append(text)
        elif isinstance(value, _PLAIN):
            self.parts.append(f"{name} = {program.literal(value)}\n")
        else:
            raise Unwritable(f"{name} is a {type(value).__name__}")

    def _import_of(self, name: str, value: Any) -> str:
        """The import that brings `value`, or "" if it is the user's own."""
        if isinstance(value, types.ModuleType):
            return f"import {name}" if name == value.__name__ else f"import {value.__name__} as {name}"
        module, attribute = getattr(value, "__module__", None) or "", getattr(value, "__name__", name)
        if module.partition(".")[0] not in _IMPORTED or isinstance(value, _PLAIN):
            return ""
        found = getattr(sys.modules.get(module), attribute, None)
        return f"from {module} import {attribute} as {name}" if found is value else ""


def _source(name: str, value: Any, decorated: bool) -> str:
    try:
        text = textwrap.dedent(inspect.getsource(value))
        (parsed,) = ast.parse(text).body
    except (OSError, SyntaxError, ValueError) as error:
        raise Unwritable(f"{name} has no source") from error
    if not decorated and isinstance(parsed, ast.FunctionDef):
        text = "\n".join(text.splitlines()[parsed.lineno - 1 :]) + "\n"
    return text


def _needed(text: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The names in a source that its module, or the functions around it, define."""
    known: Mapping[str, Any]
    if isinstance(value, types.FunctionType):
        known = {**value.__globals__, **inspect.getclosurevars(value).nonlocals}
    else:  # code that `exec` ran may name a module that there is not
        known = vars(sys.modules[value.__module__]) if value.__module__ in sys.modules else {}
    names = (node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name))
    for name in dict.fromkeys(names):
        if name in known and name != value.__name__:
            yield name, known[name]
