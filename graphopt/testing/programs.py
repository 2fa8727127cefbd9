"""Hypothesis strategies for small PyTorch programs and tensors that hurt.

    @given(strategies.programs())
    def test_my_pass(program):
        check_pass(my_pass, program.function, program.inputs)

A program mixes views, broadcasts, casts, reductions, values used several times, in-place updates of inputs and
operations that do nothing. Its `repr` is its source, and Hypothesis shrinks it to few lines and small tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from graphopt.verify import execution

_SIZES = (2, 3, 4, 5, 1)
_CAUSAL = "torch.arange({a}.shape[-1]) <= torch.arange({a}.shape[-2])[:, None]"
_SCALARS = (1.0, 0.0, 2.0, 0.5, -1.5, 1e-3)


@dataclasses.dataclass(repr=False)
class Program:
    """A function of tensors, its source, and inputs for it."""

    source: str
    function: Callable[..., Any]
    inputs: list[torch.Tensor]

    def __repr__(self) -> str:
        given = ", ".join(f"{value.dtype} {tuple(value.shape)} {value.stride()}" for value in self.inputs)
        return f"{self.source}\n# inputs: {given}"


@dataclasses.dataclass
class _Value:
    """A variable of the program under construction: its name and an example of what it holds."""

    name: str
    example: torch.Tensor


@st.composite
def programs(
    draw: st.DrawFn,
    *,
    most_steps: int = 8,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
    in_place: bool = True,
    random: bool = True,
) -> Program:
    """Programs of up to `most_steps` operations on one to three tensors, which share sizes and so may broadcast.

    in_place: with updates of inputs; random: with draws of random numbers, which a pass must not reorder.
    """
    rank = draw(st.integers(1, 3))
    sizes = [draw(st.sampled_from(_SIZES)) for _ in range(rank)]
    dtype = draw(st.sampled_from(dtypes))
    inputs, values = [], []
    for number in range(draw(st.integers(1, 3))):
        shape = [1 if number and draw(st.booleans()) else size for size in sizes]
        inputs.append(draw(hostile_tensors(tuple(shape), dtype, special=False)))
        values.append(_Value(f"x{number}", inputs[-1].clone()))
    rows = []
    for number in range(draw(st.integers(1, most_steps))):
        source = values[draw(st.integers(0, len(values) - 1))]
        other = values[draw(st.integers(0, len(values) - 1))]
        updates = in_place and source.name.startswith("x") and number > 0
        text = _step(draw, source, other, in_place=updates, random=random)
        try:
            # Later steps need the shapes only; a step that eager refuses is left out.
            made = eval(text, {"torch": torch}, {value.name: value.example.clone() for value in values})
        except (RuntimeError, IndexError):
            continue
        if made.numel() > 4096:
            continue
        rows.append(f"    v{number} = {text}")
        values.append(_Value(f"v{number}", made))
    results = [value.name for value in values if not value.name.startswith("x")][-3:] or ["x0 + 0"]
    parameters = ", ".join(f"x{number}" for number in range(len(inputs)))
    source_text = "\n".join([f"def program({parameters}):", *rows, f"    return {', '.join(results)}"])
    scope: dict[str, Any] = {"torch": torch}
    exec(source_text, scope)
    return Program(source_text, scope["program"], inputs)


def _step(draw: st.DrawFn, source: _Value, other: _Value, *, in_place: bool, random: bool) -> str:
    """One expression of the chosen values."""
    a, b = source.name, other.name
    rank = source.example.dim()
    scalar = draw(st.sampled_from(_SCALARS))
    dim = draw(st.integers(0, max(rank - 1, 0)))
    choices = [
        f"{a} + {b}",
        f"{a} * {b}",
        f"{a} - {b}",
        f"{a} * {scalar}",
        f"{a} + {scalar}",
        f"{a} / 2.0",
        f"torch.relu({a})",
        f"torch.sigmoid({a})",
        f"torch.nn.functional.silu({a})",
        f"torch.nn.functional.gelu({a})",
        f"torch.maximum({a}, {b})",
        f"torch.where({a} > {scalar}, {a}, {b})",
        f"torch.exp({a})",
        f"torch.neg({a})",
        f"{a}.clone()",
        f"{a}.to(torch.float32)",
        f"{a}.to(torch.bfloat16)",
        f"{a}.unsqueeze({dim})",
        f"{a}.reshape(-1)",
        f"{a}.flatten()[1:]",
    ]
    if rank:
        choices += [
            f"{a}.transpose({dim}, -1)",
            f"{a}.transpose({dim}, -1).contiguous()",
            f"{a}.sum({dim}, keepdim=True)",
            f"{a}.mean({dim})",
            f"{a}.amax({dim}, keepdim=True)",
            f"torch.softmax({a}, {dim})",
            f"{a}.narrow({dim}, 0, 1)",
            f"{a}.select({dim}, -1)",
            f"torch.cat([{a}, {b}], {dim})",
            f"{a}.squeeze({dim})",
            f"{a}.expand(2, *{a}.shape)",
            f"torch.nn.functional.layer_norm({a}, {a}.shape[-1:])",
            f"{a} * torch.rsqrt({a}.float().pow(2).mean(-1, keepdim=True) + 1e-5).to({a}.dtype)",
            f"{a}.view({a}.shape)",
            f"{a}.cumsum({dim})",
        ]
    if rank >= 2:
        choices += [
            f"{a} @ {a}.transpose(-1, -2)",
            f"{a}.permute(*reversed(range({rank})))",
            f"torch.where({_CAUSAL.format(a=a)}, {a}, -1e9)",
        ]
    if rank == 2:
        choices += [f"torch.nn.functional.embedding(torch.arange(3) % {a}.shape[0], {a})"]
    if random:
        choices += [f"{a} * torch.rand({a}.shape)"] * 2
    if in_place:
        choices += [f"{a}.add_(1.0)", f"{a}.mul_({scalar})", f"{a}.select(0, 0).fill_({scalar})"]
    # By a large number: of this many choices Hypothesis' own sampling repeats a few and leaves out many.
    return choices[draw(st.integers(0, 1 << 16)) % len(choices)]


@st.composite
def hostile_tensors(
    draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, special: bool = True
) -> torch.Tensor:
    """Floating point tensors of one shape: dense, transposed, cut from a larger one or expanded; 0, -0, inf, NaN, ...

    special=False keeps the values ordinary (the memory layout is still drawn).
    """
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).to(dtype)
    info = torch.finfo(dtype)
    specials = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.max, info.smallest_normal / 2, 1.0]
    if special and values.numel():
        for _ in range(draw(st.integers(0, 4))):
            place = draw(st.integers(0, values.numel() - 1))
            values.view(-1)[place] = draw(st.sampled_from(specials))
    layout = draw(st.sampled_from(("dense", "transposed", "cut", "expanded")))
    if layout == "transposed" and values.dim() >= 2:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "cut" and values.dim():
        room = execution.empty([*shape[:-1], shape[-1] + 3], _dense([*shape[:-1], shape[-1] + 3]), dtype, values.device)
        return room.zero_().narrow(-1, 1, shape[-1]).copy_(values)
    if layout == "expanded" and values.dim() and shape[0] > 1:
        return values[:1].clone().expand(shape)
    return values


def _dense(shape: list[int]) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides
