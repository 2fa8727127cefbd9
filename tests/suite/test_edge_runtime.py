"""Edge programs: threads, fork, deepcopy, pickling, hooks, RNG, autocast, graph breaks, many instances."""

import copy
import os
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.suite import compare, door
from tests.suite.compare import assert_like_eager


class _Net(torch.nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(width, 16), torch.nn.Linear(16, width)
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.gelu(self.first(x))) * self.scale + x


def test_threads_call_one_function(target: str) -> None:
    """Several threads compile and call at once; each gets the answer for its own input."""
    module = _Net().eval()
    subject = door.compiled(module, target=target)
    wrong: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            with torch.no_grad():
                for call in range(8):
                    x = torch.randn(2 + (seed + call) % 3, 8, generator=generator)
                    compare.assert_same(subject(x), module(x))
        except Exception as error:  # a thread must hand its failure over
            wrong.append(f"thread {seed}: {error!r}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_threads_mutate_weights_of_their_own_models(target: str) -> None:
    """Derived weights of one model are never served to another one in another thread."""
    wrong: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        module = _Net().eval()
        subject = door.compiled(module, target=target)
        try:
            with torch.no_grad():
                for _ in range(6):
                    module.first.weight.copy_(torch.randn(16, 8, generator=generator))
                    x = torch.randn(2, 8, generator=generator)
                    compare.assert_same(subject(x), module(x))
        except Exception as error:  # a thread must hand its failure over
            wrong.append(f"thread {seed}: {error!r}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_compile() -> None:
    """A child forked after compiling calls the compiled code and gets the same answer.

    One thread: OpenMP's own worker threads do not survive a fork, with or without a compiler.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        module = _Net().eval()
        subject = door.compiled(module, target="reference")
        x = torch.randn(3, 8)
        with torch.no_grad():
            expected = subject(x)
        child = os.fork()
        if child == 0:
            with torch.no_grad():
                right = torch.equal(subject(x), expected)
            os._exit(0 if right else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        torch.set_num_threads(threads)


def test_deepcopy_of_a_compiled_module(target: str) -> None:
    module = _Net().eval()
    subject = door.compiled(module, target=target)
    x = torch.randn(2, 8)
    with torch.no_grad():
        subject(x)
        twin = copy.deepcopy(subject)
        twin.first.weight.zero_()
        compare.assert_same(subject(x), module(x))
        compare.assert_same(twin(x), copy.deepcopy(module)(x) * 0 + _with_zero_first(module)(x))


def _with_zero_first(module: _Net) -> _Net:
    twin = copy.deepcopy(module)
    twin.first.weight.zero_()
    return twin


def test_compile_method_in_place(target: str) -> None:
    """`module.compile()` compiles without wrapping; the module keeps its class and state dict."""
    if door.BACKEND != "graphopt":
        pytest.skip("the options are graphopt's")
    module, twin = _Net().eval(), _Net().eval()
    twin.load_state_dict(module.state_dict())
    module.compile(backend="graphopt", options={"target": target})
    x = torch.randn(2, 8)
    with torch.no_grad():
        compare.assert_same(module(x), twin(x))
    assert list(module.state_dict()) == list(twin.state_dict())


def test_many_instances_of_one_class(target: str) -> None:
    modules = [_Net().eval() for _ in range(12)]
    subjects = [door.compiled(module, target=target) for module in modules]
    x = torch.randn(2, 8)
    with torch.no_grad():
        for _ in range(2):
            for module, subject in zip(modules, subjects, strict=True):
                compare.assert_same(subject(x), module(x))


def test_instances_that_differ_in_an_attribute(target: str) -> None:
    x = torch.randn(2, 8)
    with torch.no_grad():
        for scale in (1.0, 2.0, -0.5):
            module = _Net().eval()
            module.scale = scale
            compare.assert_same(door.compiled(module, target=target)(x), module(x))


def test_attribute_changes_between_calls(target: str) -> None:
    module = _Net().eval()
    subject = door.compiled(module, target=target)
    x = torch.randn(2, 8)
    with torch.no_grad():
        for scale in (1.0, 3.0, 1.0):
            module.scale = scale
            compare.assert_same(subject(x), module(x))


def test_hooks_run(target: str) -> None:
    module = _Net().eval()
    seen: list[int] = []
    module.first.register_forward_hook(lambda _module, _inputs, output: output * 2)
    module.second.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 1,))
    subject = door.compiled(module, target=target)
    x = torch.randn(2, 8)
    with torch.no_grad():
        compare.assert_same(subject(x), module(x))
        late = module.first.register_forward_hook(lambda _module, _inputs, output: seen.append(1) or output - 1)
        compare.assert_same(subject(x), module(x))
        late.remove()
        compare.assert_same(subject(x), module(x))


def test_backward_hooks_run(target: str) -> None:
    module = _Net()
    module.first.weight.register_hook(lambda gradient: gradient * 3)
    x = torch.randn(2, 8)
    door.compiled(module, target=target)(x).sum().backward()
    got = module.first.weight.grad
    module.zero_grad()
    module(x).sum().backward()
    compare.assert_same(got, module.first.weight.grad, strides=False)


@pytest.mark.parametrize("sampler", ["rand", "randn", "dropout", "bernoulli", "randint", "randperm", "multinomial"])
def test_random_numbers_are_eagers(sampler: str, target: str) -> None:
    samplers = {
        "rand": lambda x: torch.rand(5) + x,
        "randn": lambda x: torch.randn_like(x) + torch.randn(5),
        "dropout": lambda x: F.dropout(x, 0.4) + F.dropout(x, 0.4),
        "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
        "randint": lambda x: torch.randint(0, 100, (5,)) + x,
        "randperm": lambda x: x[torch.randperm(5)],
        "multinomial": lambda x: torch.multinomial(x.softmax(0), 3, replacement=True),
    }
    assert_like_eager(samplers[sampler], torch.randn(5), target=target, calls=3)


def test_two_draws_differ(target: str) -> None:
    first, second = door.compiled(lambda: (torch.rand(8), torch.rand(8)), target=target)()
    assert not torch.equal(first, second)


def test_dropout_in_training_and_not_in_eval(target: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 8))
    subject = door.compiled(module, target=target)
    x = torch.randn(4, 8)
    for training in (True, False, True):
        module.train(training)
        torch.manual_seed(5)
        got = subject(x)
        torch.manual_seed(5)
        compare.assert_same(got, module(x))


def test_dropout_mask_is_the_same_in_backward(target: str) -> None:
    x = torch.ones(1000, requires_grad=True)
    y = door.compiled(lambda x: F.dropout(x * 2, 0.3), target=target)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_call(dtype: torch.dtype, target: str) -> None:
    module = _Net().eval()
    subject = door.compiled(module, target=target)
    x = torch.randn(2, 8)
    with torch.no_grad():
        compare.assert_same(subject(x), module(x))
        with torch.autocast("cpu", dtype=dtype):
            compare.assert_same(subject(x), module(x))
        compare.assert_same(subject(x), module(x))


def test_autocast_inside(target: str) -> None:
    weight = torch.randn(8, 8)

    def program(x: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ weight
            with torch.autocast("cpu", enabled=False):
                z = x @ weight
        return y, z, x @ weight, y.softmax(-1)

    assert_like_eager(program, torch.randn(2, 8), target=target)


def test_graph_break_in_the_middle(target: str) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        y.add_(1)
        return y @ y.t()

    assert_like_eager(program, torch.randn(3, 4), target=target)
    assert door.graphs_compiled() == 2


def test_inference_mode(target: str) -> None:
    module = _Net().eval()
    subject = door.compiled(module, target=target)
    x = torch.randn(2, 8)
    with torch.inference_mode():
        got, want = subject(x), module(x)
        compare.assert_same(got, want)
        assert got.is_inference() == want.is_inference()
    with torch.no_grad():
        compare.assert_same(subject(x), module(x))
    compare.assert_same(subject(x), module(x))


def test_weights_made_in_inference_mode(target: str) -> None:
    """Inference tensors have no version counter; guards on weights must do without it."""
    with torch.inference_mode():
        module = _Net().eval()
        subject = door.compiled(module, target=target)
        x = torch.randn(2, 8)
        compare.assert_same(subject(x), module(x))
        module.first.weight.mul_(2)
        compare.assert_same(subject(x), module(x))


def test_grad_mode_toggles(target: str) -> None:
    module = _Net()
    subject = door.compiled(module, target=target)
    x = torch.randn(2, 8, requires_grad=True)
    for enabled in (True, False, True):
        with torch.set_grad_enabled(enabled):
            compare.assert_same(subject(x), module(x))


def test_requires_grad_input_under_no_grad(target: str) -> None:
    with torch.no_grad():
        assert_like_eager(lambda x: (x * 2, x.view(-1), x), torch.randn(2, 3, requires_grad=True), target=target)


def test_vmap_and_functional_call(target: str) -> None:
    module = _Net().eval()

    def program(x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda row: (row * 2).softmax(0))(x)

    assert_like_eager(program, torch.randn(3, 4), target=target)
    weights = {name: value.detach() * 2 for name, value in module.named_parameters()}
    subject = door.compiled(lambda w, x: torch.func.functional_call(module, w, (x,)), target=target)
    x = torch.randn(2, 8)
    with torch.no_grad():
        compare.assert_same(subject(weights, x), torch.func.functional_call(module, weights, (x,)))


def test_default_dtype_changes(target: str) -> None:
    subject = door.compiled(lambda x: x + torch.ones(3) * 0.1, target=target)
    assert subject(torch.ones(3)).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    assert subject(torch.ones(3, dtype=torch.float32)).dtype == torch.float64


def test_tensor_subclass(target: str) -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    assert_like_eager(lambda p: (p * 2, p), parameter, target=target)


def test_results_outlive_the_next_call(target: str) -> None:
    """An answer is the caller's: a later call does not overwrite it."""
    module = _Net().eval()
    subject = door.compiled(module, target=target)
    x, y = torch.randn(2, 8), torch.randn(2, 8)
    with torch.no_grad():
        first = subject(x)
        kept = first.clone()
        subject(y)
        assert torch.equal(first, kept)
        first.zero_()
        compare.assert_same(subject(x), module(x))
