"""The kernels inside of the one file that Inductor writes for a graph."""

from __future__ import annotations

import re

from graphopt.lowering import KernelSource

_DEFINITION = re.compile(
    r"^(?P<name>\w+) = async_compile\.(?P<how>\w+)\((?:[^\n]*?)(?P<quote>'''|\"\"\")(?P<body>.*?)(?P=quote)",
    flags=re.DOTALL | re.MULTILINE,
)
_NODES = re.compile(r"^#\s+%(\w+) : ", flags=re.MULTILINE)


def of_inductor(source: str) -> list[KernelSource]:
    """The kernels that `source` defines, in order, and at last, as "call", what calls them.

    nodes are those that Inductor names in the comment above a kernel.
    """
    found, end = [], 0
    rest = []
    for definition in _DEFINITION.finditer(source):
        above = source[end : definition.start()]
        nodes = tuple(dict.fromkeys(_NODES.findall(above)))
        language = "cpp" if definition["how"].startswith("cpp") else "python"
        found.append(KernelSource(definition["name"], language, definition["body"].strip("\n"), nodes))
        rest.append(above)
        end = definition.end()
    if source.strip():
        rest.append(source[end:].lstrip(")\n"))
        found.append(KernelSource("call", "python", "".join(rest).strip("\n")))
    return found
