"""Linears and look-ups on packed weights: `torch.ops.graphopt_cpp.quantized_linear` and its kin.

A few rows of x: codes are made numbers in registers and multiplied at the precision of x, as pairs of bfloat16 where
the machine has them (codes are exact in bfloat16), in float32 elsewhere, as integers for the schemes that round x too.
Codes of int8 meet rows of bfloat16 as integers as well, and so do those of int4 and mxfp4 where there is no AVX-512: x
becomes fixed-point numbers that keep what bfloat16 had of it (src/quantized_fixed.h).
From 5 rows of bfloat16 the weight is made bfloat16 in a buffer that stays in the cache; from 17 rows of any dtype torch
multiplies such buffers, as it would a plain weight.
A row of x with an infinity gives values that are not finite, but not always those of the meaning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from graphopt.backends.cpp import operands
from graphopt.lowering import Lowering, arguments, same_arguments
from graphopt.quantization import operations, schemes


def lowerings() -> tuple[Lowering, ...]:
    """Lowerings of the dialect's operations on packed weights; the library must be loaded."""
    kernels = torch.ops.graphopt_cpp
    one, all_at_once = kernels.quantized_linear.default, kernels.parallel_quantized_linear.default
    by_expert, look_up = kernels.quantized_grouped_linear.default, kernels.quantized_embedding.default
    grouped = operations.quantized_grouped_linear
    return (
        Lowering("cpp.quantized_linear", operations.quantized_linear, _linear, same_arguments(one)),
        Lowering(
            "cpp.parallel_quantized_linear", operations.parallel_quantized_linear, _linear, same_arguments(all_at_once)
        ),
        Lowering("cpp.quantized_grouped_linear", grouped, _grouped, same_arguments(by_expert)),
        Lowering("cpp.quantized_embedding", operations.quantized_embedding, _embedding, same_arguments(look_up)),
    )


def unsupported_reason(x: Tensor, packed: Sequence[Tensor], biases: Sequence[Tensor | None], scheme: str) -> str | None:
    """Why the kernels cannot take x [..., K] and packed weights, real or fake; None if they can."""
    reason = operands.declined([x, *(bias for bias in biases if bias is not None)])
    if reason is not None:
        return reason
    if x.dim() < 1:
        return "x is a scalar"
    if not all(bias is None or bias.is_contiguous() for bias in biases):
        return "a bias is not contiguous"
    return _unfit(packed, scheme)


def _unfit(packed: Sequence[Tensor], scheme: str) -> str | None:
    if any(part.device.type != "cpu" for part in packed):
        return "not on the CPU"
    if not all(part.is_contiguous() for part in packed):
        return "a packed tensor is not contiguous"
    how = schemes.named(scheme)
    dtypes = (how.dtype, *how.parameter_dtypes)
    if any(part.dtype != dtype for part, dtype in zip(packed, dtypes * (len(packed) // len(dtypes)), strict=True)):
        return f"the packed tensors have other dtypes than {scheme} has"
    return None


def _linear(node: fx.Node) -> str | None:
    given = arguments(node)
    biases = given["biases"] if "biases" in given else [given["bias"]]
    values = [None if bias is None else bias.meta["val"] for bias in biases]
    return unsupported_reason(given["x"].meta["val"], _values(given["packed"]), values, given["scheme"])


def _grouped(node: fx.Node) -> str | None:
    given = arguments(node)
    unfit = unsupported_reason(given["x"].meta["val"], _values(given["packed"]), [], given["scheme"])
    return _unfit_places(given["ends"]) or unfit


def _embedding(node: fx.Node) -> str | None:
    given = arguments(node)
    if given["dtype"] not in operands.DTYPES:
        return f"dtype {operands.name(given['dtype'])} is none of {', '.join(map(operands.name, operands.DTYPES))}"
    return _unfit_places(given["indices"]) or _unfit(_values(given["packed"]), given["scheme"])


def _unfit_places(node: fx.Node) -> str | None:
    places = node.meta["val"]
    if places.device.type != "cpu" or places.dtype not in (torch.int32, torch.int64):
        return f"places of {operands.name(places.dtype)} on {places.device.type}"
    return None


def _values(nodes: Sequence[fx.Node]) -> list[Tensor]:
    return [node.meta["val"] for node in nodes]
