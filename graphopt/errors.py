"""The errors graphopt raises: each says what is wrong, where, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphoptError(Exception):
    """Root of every error that graphopt raises on purpose."""


class OptionError(GraphoptError, ValueError):
    """An option is unknown or has a value that is not allowed; raised before any work is done."""


class PassError(GraphoptError):
    """A pass raised, or left a graph that breaks the pass contract (raised under `strict=True`)."""


class PatternError(GraphoptError, ValueError):
    """A pattern of `graphopt.match` cannot be traced, or no graph could ever contain it."""


class LoweringError(GraphoptError):
    """A graph could not be lowered to the chosen target (raised under `strict=True`)."""


class KVCapacityError(GraphoptError, RuntimeError):
    """A KV cache outgrows the fixed capacity that the option `kv_capacity` gave it."""


class VerificationError(GraphoptError):
    """A rewrite does not compute what the nodes it replaced computed."""


class CacheError(GraphoptError):
    """The on-disk cache cannot be trusted: wrong owner, permissions, or not a directory."""


class StalePruningError(GraphoptError):
    """A compiled graph leaves out a head or channel that has come alive; the call is run again without pruning."""


class ExportError(GraphoptError, ValueError):
    """A pruned model cannot be written in the form that its architecture's configuration has."""


class WeightsReleasedError(GraphoptError):
    """A full-precision weight was used after it had been released on the user's request."""


class StoredFileError(GraphoptError):
    """A file that graphopt should have written is damaged, cut short, or was written by something else."""


def nearest(given: object, allowed: Iterable[object]) -> str:
    """What was probably meant, as a part of a message: " (did you mean 'int8'?)", or "" if nothing is near."""
    near = difflib.get_close_matches(str(given), list(map(str, allowed)), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
