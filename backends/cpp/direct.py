"""Compiled graphs call the operators as plain functions of Python (src/direct.h), not through torch's dispatcher."""

from __future__ import annotations

import ctypes

import torch

from graphopt import _compat
from graphopt.runtime import kv, packs


def call_directly(library: str) -> None:
    """Have code that Inductor writes from now on call the functions of `library`, the operators' file, once loaded."""
    make_module = ctypes.PyDLL(library).graphopt_direct
    make_module.restype = ctypes.py_object
    module = make_module()
    functions = {name: function for name, function in vars(module).items() if not name.startswith("__")}
    packs.compare_with(functions.pop("unchanged"))
    kv.reserve_with(functions.pop("reserve"))
    for name, function in functions.items():
        _compat.inductor_calls_function(getattr(torch.ops.graphopt_cpp, name).default, function)
