"""The report as one HTML page that needs nothing else: `graphopt explain MODEL --html FILE`."""

from __future__ import annotations

from graphopt.html.page import render as render
