"""Run one generated kernel under Triton's interpreter, on CPU tensors, without an environment variable.

Triton reads TRITON_INTERPRET when `triton.jit` decorates a function, its own library included, so the variable would
have to be set before triton is first imported. Instead a kernel that was decorated as usual is run through
`InterpretedFunction(kernel.fn)`, and for the time of the run

* a call of a jitted function (Triton's own `tl.sum`, or a helper of the file) runs its Python body;
* the functions of libdevice, which the interpreter cannot run, are computed by the torch function of the same meaning;
* a number that a loop runs to is taken from an array of one element (Triton 3.6 asks numpy to, and newer ones refuse);
* what Triton 3.9's interpreter gets silently wrong is put right: a cast to bfloat16 truncates instead of rounding to
  nearest, a cast from an integer to bfloat16 and `tl.dot` of bfloat16 operands compute on the raw bits, and the result
  of a comparison keeps its operands' type.

Not safe for several threads by itself: a lock is held.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

_lock = threading.RLock()
_interpreted: dict[Callable[..., Any], Any] = {}

_MEANINGS: dict[str, Callable[..., torch.Tensor]] = {
    **{name: getattr(torch, name) for name in (
        "log10", "log1p", "expm1", "tan", "tanh", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh",
        "erfc", "erfinv", "lgamma", "trunc", "atan2", "hypot", "nextafter", "copysign", "fmod", "pow", "signbit",
    )},
    "nearbyint": torch.round,
    "erfcx": torch.special.erfcx,
    "j0": torch.special.bessel_j0,
    "j1": torch.special.bessel_j1,
    "y0": torch.special.bessel_y0,
    "y1": torch.special.bessel_y1,
    "cyl_bessel_i0": torch.special.i0,
    "cyl_bessel_i1": torch.special.i1,
}


def _computed(function: Callable[..., torch.Tensor]) -> Callable[..., tl.tensor]:
    """A libdevice function on the interpreter's arrays."""

    def run(*operands: Any) -> tl.tensor:
        tensor = next(o for o in operands if isinstance(o, tl.tensor))
        arrays = [o.handle.data if isinstance(o, tl.tensor) else np.asarray(o, tensor.handle.data.dtype)
                  for o in operands]
        result = function(*(torch.from_numpy(np.ascontiguousarray(a)) for a in np.broadcast_arrays(*arrays))).numpy()
        scalar = tl.int32 if result.dtype == np.bool_ else tensor.type.scalar
        if result.dtype == np.bool_:
            result = result.astype(np.int32)
        is_block = any(isinstance(o, tl.tensor) and o.type.is_block() for o in operands)
        kind = tl.block_type(scalar, list(result.shape)) if is_block else scalar
        return tl.tensor(TensorHandle(result, scalar), kind)

    return run


_cast = InterpreterBuilder.cast_impl
_tensor = interpreter._patch_lang_tensor
_dot = InterpreterBuilder.create_dot
_binary = InterpreterBuilder.binary_op


def _tensor_of(handle: TensorHandle) -> torch.Tensor:
    """The interpreter's array as a tensor; it keeps bfloat16 as raw 16-bit integers."""
    data = np.ascontiguousarray(handle.data)
    if handle.dtype.scalar == tl.bfloat16:
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(data)


def _right_cast(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
    to, given = target.scalar, source.dtype.scalar
    if tl.bfloat16 not in (to, given) or to == given:
        return _cast(self, source, target)
    value = _tensor_of(source)
    if to == tl.bfloat16:
        raw = value.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(raw, to)
    return _cast(self, TensorHandle(value.float().numpy(), tl.float32), target)


def _right_binary(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, operation: Any) -> TensorHandle:
    result = _binary(self, a, b, operation)
    return TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else result


def _right_dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *precision: Any
) -> TensorHandle:
    wide = [TensorHandle(_tensor_of(h).float().numpy(), tl.float32) if h.dtype.scalar == tl.bfloat16 else h
            for h in (a, b)]
    return _dot(self, *wide, d, *precision)


def _right_tensor(tensor: Any, *rest: Any) -> None:
    _tensor(tensor, *rest)
    tensor.__index__ = lambda self: int(self.handle.data.item())


@contextlib.contextmanager
def _interpreter() -> Iterator[None]:
    saved = {name: getattr(libdevice, name) for name in _MEANINGS}
    call = JITFunction.__call__
    with _lock, np.errstate(all="ignore"):
        try:
            for name, function in _MEANINGS.items():
                setattr(libdevice, name, _computed(function))
            InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = _right_cast, _right_dot
            InterpreterBuilder.binary_op = _right_binary
            interpreter._patch_lang_tensor = _right_tensor
            JITFunction.__call__ = lambda self, *args, **kwargs: self.fn(*args, **kwargs)
            yield
        finally:
            JITFunction.__call__ = call
            InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = _cast, _dot
            InterpreterBuilder.binary_op = _binary
            interpreter._patch_lang_tensor = _tensor
            for name, function in saved.items():
                setattr(libdevice, name, function)


def launch(kernel: JITFunction[Any], grid: int, *arguments: Any, **constants: Any) -> None:
    """Run `grid` programs of a jitted kernel on CPU tensors. Compiler options among the constants are ignored."""
    if grid <= 0:
        return
    if kernel.fn not in _interpreted:
        # Triton replaces the functions of the modules it finds among a kernel's globals; its own library uses core.
        kernel.fn.__globals__.setdefault("_triton_core", tl.core)
        _interpreted[kernel.fn] = InterpretedFunction(kernel.fn)
    with _interpreter():
        _interpreted[kernel.fn][(grid,)](*arguments, **constants)


