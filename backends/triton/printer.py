"""Print index expressions as Triton (and Python) text.

Only the expression kinds listed here print; anything else raises, so that no text of a graph reaches the source.
"""

from __future__ import annotations

import re

import sympy

from graphopt.backends.triton.region import Unsupported

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_DIVISIONS = {"FloorDiv": "//", "CleanDiv": "//", "FloorDivide": "//", "Mod": "%", "PythonMod": "%", "Remainder": "%"}


def text_of(expression: sympy.Expr, grouped: bool = False) -> str:
    """The text of an integer expression; `grouped` puts a sum or product in parentheses.

    Raises Unsupported for a kind of expression that index arithmetic does not make.
    """
    text, is_atom = _print(sympy.sympify(expression))
    return f"({text})" if grouped and not is_atom else text


def _print(expression: sympy.Expr) -> tuple[str, bool]:
    if expression.is_Integer:
        return (str(int(expression)), True) if expression >= 0 else (f"({int(expression)})", True)
    if expression.is_Symbol:
        if not _NAME.match(expression.name):
            raise Unsupported("a symbol with an unprintable name")
        return expression.name, True
    if isinstance(expression, sympy.Add):
        terms = sorted(expression.args, key=lambda term: (term.is_number, str(term)))
        return " + ".join(text_of(term) for term in terms), False
    if isinstance(expression, sympy.Mul):
        factors = sorted(expression.args, key=lambda factor: (not factor.is_number, str(factor)))
        return " * ".join(text_of(factor, True) for factor in factors), False
    if isinstance(expression, sympy.Pow) and expression.exp.is_Integer and expression.exp > 0:
        return " * ".join([text_of(expression.base, True)] * int(expression.exp)), False
    name = type(expression).__name__
    if name in _DIVISIONS:
        first, second = (text_of(argument, True) for argument in expression.args)
        return f"({first} {_DIVISIONS[name]} {second})", True
    if name in ("Max", "Min"):  # sympy's, or torch's classes of these names
        return f"{name.lower()}({', '.join(text_of(argument) for argument in sorted(expression.args, key=str))})", True
    raise Unsupported(f"an index expression of kind {name}")

