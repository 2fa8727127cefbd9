"""Launch generated Triton kernels at little more than the cost of Triton's C launcher.

`kernel[grid](...)` binds arguments by name, asks each for its specialisation, builds a key, looks the compiled kernel
up by it, and hands tensors to a C function that asks each for its address and the driver about the address. A
`Launcher` learns from the first launch of a kind which compiled kernel serves what Triton specialises on (dtypes,
16-byte alignment of addresses, integers that are 1, multiples of 16 or wide, constants), and then calls that kernel's
own launcher, with addresses in place of tensors.

Triton itself launches whenever something is not as expected: a target other than CUDA (AMD specialises on more), an
argument that is neither a tensor nor an integer, a compiled kernel of another make, or a hook that wants to see the
launches (a profiler's, a debugger's). Relied on are `run`, `function` and `packed_metadata` of the compiled kernel that
`kernel[grid](...)` answers, and the nine leading arguments of `run`: the same in Triton 3.6 and 3.9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Launch = Callable[..., Any]
"""(kernel, number of programs, *arguments, **constants); answers what Triton compiled for them, where it tells."""

_LONG = 2**31


_more: dict[tuple[Any, ...], dict[str, int]] = {}


def all_registers(num_warps: int) -> dict[str, int]:
    """The option that lets a thread have as many registers as there are for it, where it may be denied some.

    ptxas spills a few bytes of a kernel when that makes room for one program more on a processor. A kernel that was
    given its size by what it needs has no use for that.
    """
    return {"maxnreg": 255} if num_warps <= 8 else {}


def jit(kernel: Any, grid: int, *arguments: Any, **constants: Any) -> Any:
    """Launch as Triton does; answers its compiled kernel.

    One that spills on an NVIDIA GPU gets all registers, and runs once more: generated kernels may do so.
    """
    if grid <= 0:
        return None
    key = (kernel.fn, *constants.items())
    compiled = kernel[(grid,)](*arguments, **constants, **_more.get(key, {}))
    if key not in _more:
        spills = getattr(compiled, "n_spills", 0) and torch.version.hip is None
        _more[key] = all_registers(constants.get("num_warps", 4)) if spills else {}
        if _more[key]:
            return jit(kernel, grid, *arguments, **constants)
    return compiled


class Launcher:
    """Launches jitted kernels, those that it has seen before directly.

    A constant is told from another by which object it is: one call in a program gives the same objects each time.

    cold: how a kernel is launched the first time with arguments of a kind. active: Triton's driver, that of the
    process if None. direct: whether kernels may be launched directly, None before the first launch.
    """

    def __init__(self, cold: Launch = jit, active: Any = None) -> None:
        self.cold = cold
        self.direct: bool | None = None
        self._driver = active
        self._warm: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(self, kernel: Any, grid: int, *arguments: Any, **constants: Any) -> None:
        """Run `grid` programs of a kernel; nothing for none. Raises what Triton raises."""
        if grid <= 0:
            return
        if not self.direct and (self.direct is not None or not self._connect()):
            self.cold(kernel, grid, *arguments, **constants)
            return
        device = self._device()
        key: list[Any] = [kernel.fn, device, *map(id, constants.values())]
        given: list[int] = []
        together = 0
        try:
            for argument in arguments:
                if type(argument) is int:
                    key.append((argument == 1, argument % 16 == 0, -_LONG <= argument < _LONG, argument < 2**63))
                    given.append(argument)
                else:
                    address = argument.data_ptr()
                    together |= address
                    key.append(argument.dtype)
                    given.append(address)
        except AttributeError:  # neither a tensor nor an integer
            self.cold(kernel, grid, *arguments, **constants)
            return
        if together & 15:
            key += [address & 15 == 0 for address in given]
        found = self._warm.get(tuple(key))
        if found is None or kernel.pre_run_hooks or self._is_watched():
            compiled = self.cold(kernel, grid, *arguments, **constants)
            if found is None:
                self._learn(tuple(key), kernel, compiled, constants)
            return
        run, function, metadata, rest, _ = found
        run(grid, 1, 1, self._stream(device), function, metadata, None, None, None, *given, *rest)

    def _is_watched(self) -> bool:
        """Does a hook want to see the launches? (None, or a chain of none, does not.)"""
        enter, leave = self._hooks.launch_enter_hook, self._hooks.launch_exit_hook
        return not all(hook is None or getattr(hook, "calls", None) == [] for hook in (enter, leave))

    def _learn(self, key: tuple[Any, ...], kernel: Any, compiled: Any, constants: dict[str, Any]) -> None:
        """Keep a compiled kernel, if it is of the known make and its constants can be put in order."""
        parts = [getattr(compiled, name, None) for name in ("run", "function", "packed_metadata")]
        names = list(getattr(kernel, "arg_names", ()))
        own = [name for name in names if name in constants]
        if any(part is None for part in parts) or names[len(names) - len(own) :] != own:
            return
        kept = tuple(constants.values())  # the key names them by their addresses
        self._warm[key] = (*parts, tuple(constants[name] for name in own), kept)

    def _connect(self) -> bool:
        """Find Triton's driver; False where its kernels are not launched directly."""
        from triton import knobs
        from triton.runtime import driver

        active = self._driver or driver.active
        self._hooks = knobs.runtime
        self._device, self._stream = active.get_current_device, active.get_current_stream
        self.direct = getattr(active.get_current_target(), "backend", None) == "cuda"
        return self.direct
