"""Large pages under the weights: half the time of reading them can be the translation of addresses.

A decode step on the CPU takes the time of reading all weights once. With pages of 4 KiB that is a translation for each
64 cache lines, and in a virtual machine each of them walks two tables; with pages of 2 MiB it is one for 32768 lines.
Linux gives allocations of torch's size small pages; `MADV_COLLAPSE` (Linux 6.1) moves memory that is in use onto large
ones, at the same addresses, with the same content. A system that is set to "never" in
/sys/kernel/mm/transparent_hugepage/enabled is left as it is.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.runtime.counters import counters

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_PAGE = 2 << 20
_MADV_COLLAPSE = 25
_WORTH = _PAGE * 3 // 4  # a page is moved if so many bytes of it belong to the tensors: the rest would only take memory

_PATIENCE = 8  # so many refusals in a row: the system has no large pages left, or none for such memory


def enlarge(tensors: Iterable[Tensor]) -> int:
    """Move the memory of dense CPU tensors onto large pages where they fill them. Returns how many pages were moved.

    The tensors' addresses and contents stay. Takes about a millisecond for each page, once. Does nothing where the
    system has no such pages or does not want them.
    """
    if not _is_wanted():
        return 0
    used: defaultdict[int, int] = defaultdict(int)
    for begin, end in {_span(tensor) for tensor in tensors if _has_memory(tensor)}:
        for page in range(begin // _PAGE, (end - 1) // _PAGE + 1):
            used[page] += min(end, (page + 1) * _PAGE) - max(begin, page * _PAGE)
    moved = failed = 0
    for page in sorted(page for page, size in used.items() if size >= _WORTH):
        if _collapse(page):
            moved, failed = moved + 1, 0
        elif (failed := failed + 1) == _PATIENCE:
            break
    counters["large_pages"] += moved
    return moved


def _has_memory(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    return plain and tensor.device.type == "cpu" and tensor.layout is torch.strided and tensor.numel() > 0


def _span(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


@functools.cache
def _is_wanted() -> bool:
    try:
        return sys.platform == "linux" and "[never]" not in _SETTING.read_text()
    except OSError:
        return False


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    function: Any = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    advise: Callable[[int, int, int], int] = function
    return advise


def _collapse(page: int) -> bool:
    return _madvise()(page * _PAGE, _PAGE, _MADV_COLLAPSE) == 0
