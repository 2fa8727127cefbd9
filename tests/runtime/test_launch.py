"""The direct launch of Triton kernels: what is looked up, what is handed over, and when Triton launches itself."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from graphopt.runtime.launch import Launcher, jit

triton = pytest.importorskip("triton")


class Compiled:
    """What Triton's `CompiledKernel` shows of itself; keeps what its launcher is called with."""

    def __init__(self) -> None:
        self.function, self.packed_metadata = object(), object()
        self.calls: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.calls.append(arguments)


class Kernel:
    """A jitted function that compiles anew for what Triton specialises on, by Triton's own rules."""

    arg_names = ["in0", "out0", "n0", "BLOCK", "INDEX"]
    fn = print

    def __init__(self) -> None:
        self.pre_run_hooks: list[Any] = []
        self.compiled: dict[Any, Compiled] = {}
        self.launched = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def launch(*arguments: Any, **constants: Any) -> Compiled:
            from triton.backends.nvidia.compiler import CUDABackend
            from triton.runtime.jit import native_specialize_impl

            special = [native_specialize_impl(CUDABackend, a, False, True, True) for a in arguments]
            self.launched += 1
            key = (*special, *map(str, constants.values()))
            return self.compiled.setdefault(str(key), Compiled())

        return launch


def driver(backend: str = "cuda") -> Any:
    return types.SimpleNamespace(
        get_current_target=lambda: types.SimpleNamespace(backend=backend),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 77,
    )


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def launch(launcher: Launcher, kernel: Any, x: torch.Tensor, size: int = 32, grid: int = 4, **more: Any) -> None:
    constants = {"BLOCK": 128, "num_warps": 4, "INDEX": triton.language.int32, "enable_fp_fusion": False, **more}
    launcher(kernel, grid, x, torch.empty(64), size, **constants)


def test_the_second_launch_goes_straight_to_the_compiled_kernel(kernel: Kernel) -> None:
    launcher, x = Launcher(active=driver()), torch.randn(64)
    out = torch.empty(64)
    constants = {"BLOCK": 128, "num_warps": 4, "INDEX": triton.language.int32}
    for _ in range(3):
        launcher(kernel, 5, x, out, 32, **constants)
    (compiled,) = kernel.compiled.values()
    assert kernel.launched == 1 and launcher.direct
    head = (5, 1, 1, 77, compiled.function, compiled.packed_metadata, None, None, None)
    assert compiled.calls == [(*head, x.data_ptr(), out.data_ptr(), 32, 128, triton.language.int32)] * 2


OTHERS: dict[str, Callable[[Launcher, Kernel], None]] = {
    "dtype": lambda launcher, kernel: launch(launcher, kernel, torch.randn(64).half()),
    "alignment": lambda launcher, kernel: launch(launcher, kernel, torch.randn(65)[1:]),
    "one": lambda launcher, kernel: launch(launcher, kernel, torch.randn(64), 1),
    "not a multiple of 16": lambda launcher, kernel: launch(launcher, kernel, torch.randn(64), 33),
    "64 bits": lambda launcher, kernel: launch(launcher, kernel, torch.randn(64), 2**31),
    "unsigned 64 bits": lambda launcher, kernel: launch(launcher, kernel, torch.randn(64), 2**63),
    "constant": lambda launcher, kernel: launch(launcher, kernel, torch.randn(64), BLOCK=256),
    "index type": lambda launcher, kernel: launch(launcher, kernel, torch.randn(64), INDEX=triton.language.int64),
    "option": lambda launcher, kernel: launch(launcher, kernel, torch.randn(64), num_warps=8),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_triton_specialises_on_is_another_kernel(what: str, kernel: Kernel) -> None:
    launcher = Launcher(active=driver())
    for _ in range(2):
        launch(launcher, kernel, torch.randn(64))
        OTHERS[what](launcher, kernel)
    assert len(kernel.compiled) == 2 and kernel.launched == 2
    assert [len(compiled.calls) for compiled in kernel.compiled.values()] == [1, 1]


def test_it_matters_which_address_is_not_aligned(kernel: Kernel) -> None:
    launcher, whole, part = Launcher(active=driver()), torch.randn(64), torch.randn(65)[1:]
    for _ in range(2):
        for first, second in ((whole, part), (part, whole), (part, part)):
            launcher(kernel, 1, first, second, 32, BLOCK=1, INDEX=2)
    assert len(kernel.compiled) == kernel.launched == 3


def test_equal_specialisations_share_a_kernel(kernel: Kernel) -> None:
    launcher = Launcher(active=driver())
    for size in (32, 48, 1600, -16):
        launch(launcher, kernel, torch.randn(64), size)
    assert kernel.launched == 1


@pytest.mark.parametrize(("spills", "warps", "seen"), [(0, 4, [None]), (2, 4, [None, 255]), (2, 16, [None])])
def test_a_kernel_that_spills_gets_all_registers(spills: int, warps: int, seen: list[int | None]) -> None:
    given: list[int | None] = []

    class Spilling:
        fn = object()

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            def run(*arguments: Any, maxnreg: int | None = None, **constants: Any) -> Any:
                given.append(maxnreg)
                return types.SimpleNamespace(n_spills=0 if maxnreg else spills, maxnreg=maxnreg)

            return run

    kernel = Spilling()
    assert jit(kernel, 1, torch.randn(4), num_warps=warps).maxnreg == seen[-1] and given == seen
    assert jit(kernel, 1, torch.randn(4), num_warps=warps).maxnreg == seen[-1] and given == [*seen, seen[-1]]


def test_no_programs_launch_nothing(kernel: Kernel) -> None:
    launcher = Launcher(active=driver())
    launch(launcher, kernel, torch.randn(64), grid=0)
    assert kernel.launched == 0


def test_another_backend_is_left_to_triton(kernel: Kernel) -> None:
    launcher = Launcher(active=driver("hip"))
    for _ in range(3):
        launch(launcher, kernel, torch.randn(64))
    assert kernel.launched == 3 and launcher.direct is False


@pytest.mark.parametrize("missing", ["function", "packed_metadata", "run"])
def test_a_compiled_kernel_of_another_make_is_left_to_triton(missing: str, kernel: Kernel) -> None:
    fields = {name: object() for name in ("function", "packed_metadata", "run") if name != missing}
    cold = mock.Mock(return_value=types.SimpleNamespace(**fields))
    launcher = Launcher(cold, driver())
    for _ in range(3):
        launch(launcher, kernel, torch.randn(64))
    assert cold.call_count == 3


def test_constants_that_are_not_the_last_parameters_are_left_to_triton(kernel: Kernel) -> None:
    kernel.arg_names = ["in0", "BLOCK", "out0", "n0", "INDEX"]
    launcher = Launcher(active=driver())
    for _ in range(3):
        launch(launcher, kernel, torch.randn(64))
    assert kernel.launched == 3


def test_an_argument_of_another_kind_is_left_to_triton(kernel: Kernel) -> None:
    cold = mock.Mock(return_value=Compiled())
    launcher = Launcher(cold, driver())
    for _ in range(2):
        launcher(kernel, 1, torch.randn(64), 2.5, 3, BLOCK=1)
        launcher(kernel, 1, torch.randn(64), True, 3, BLOCK=1)
    assert cold.call_count == 4


@pytest.fixture
def hooks() -> Iterator[Any]:
    runtime = triton.knobs.runtime
    saved = runtime.launch_enter_hook
    yield runtime
    runtime.launch_enter_hook = saved


def test_hooks_see_every_launch(kernel: Kernel, hooks: Any) -> None:
    launcher = Launcher(active=driver())
    launch(launcher, kernel, torch.randn(64))
    hooks.launch_enter_hook = lambda metadata: None
    launch(launcher, kernel, torch.randn(64))
    hooks.launch_enter_hook = None
    launch(launcher, kernel, torch.randn(64))
    kernel.pre_run_hooks.append(print)
    launch(launcher, kernel, torch.randn(64))
    assert kernel.launched == 3


def test_an_error_of_the_first_launch_is_raised_and_nothing_is_kept(kernel: Kernel) -> None:
    failing = mock.Mock(side_effect=RuntimeError("out of resource"))
    launcher = Launcher(failing, driver())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of resource"):
            launch(launcher, kernel, torch.randn(64))
    assert failing.call_count == 2
