"""One rewrite, x * sigmoid(x) -> silu(x), with its property test, twice: for graphopt and for Inductor's matcher.

Each half is written as a user would write it from an empty file. `main` counts their lines, runs both tests, and shows
what each says where the pattern almost stands.

python examples/ten_minute_pass.py
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, fx

QUICKLY = settings(
    max_examples=4, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


class Graphopt:
    """With graphopt.match and graphopt.testing."""

    def __init__(self) -> None:
        import graphopt
        from graphopt import match
        from graphopt.testing import check_near_misses, check_pass, strategies

        @match.pattern(x=(2, 3))
        def times_its_sigmoid(x: Tensor) -> Tensor:
            return x * torch.sigmoid(x)

        def silu(x: Tensor) -> Tensor:
            return torch.nn.functional.silu(x)

        @graphopt.graph_pass(exactness="rounding")
        def recognize_silu(graph_module: fx.GraphModule) -> int:
            return match.rewrite(graph_module, times_its_sigmoid, silu)

        @QUICKLY
        @given(strategies.programs(most_steps=3))
        def test(program: Any) -> None:
            check_pass(recognize_silu, program.function, program.inputs)

        def test_the_pattern() -> None:
            check_pass(recognize_silu, lambda x: x * torch.sigmoid(x), [torch.randn(3, 4)], count=1)
            check_near_misses(recognize_silu, lambda x: x * torch.sigmoid(x), [torch.randn(3, 4)])

        self.tests, self.rewrite = (test, test_the_pattern), recognize_silu


class Inductor:
    """With torch._inductor.pattern_matcher; graphs, inputs and comparisons of the test are the user's business."""

    def __init__(self) -> None:
        from torch._inductor.decomposition import select_decomp_table
        from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement
        from torch.fx.experimental.proxy_tensor import make_fx

        from graphopt.testing import strategies  # it has no random programs of its own

        def times_its_sigmoid(x: Tensor) -> Tensor:
            return x * torch.sigmoid(x)

        def silu(x: Tensor) -> Tensor:
            return torch.nn.functional.silu(x)

        patterns = PatternMatcherPass()
        register_replacement(times_its_sigmoid, silu, [torch.randn(2, 3)], fwd_only, patterns)

        def recognize_silu(graph_module: fx.GraphModule) -> int:
            count = patterns.apply(graph_module.graph)
            graph_module.recompile()
            return count

        def check(function: Callable[..., Any], inputs: list[Tensor]) -> int:
            table = select_decomp_table()
            copies = [value.clone() for value in inputs]
            graph_module = make_fx(torch.func.functionalize(function), table)(*copies)
            count = recognize_silu(graph_module)
            changed, expected = [value.clone() for value in inputs], [value.clone() for value in inputs]
            torch.testing.assert_close(graph_module(*changed), function(*expected), equal_nan=True)
            torch.testing.assert_close(changed, expected, equal_nan=True)
            return count

        @QUICKLY
        @given(strategies.programs(most_steps=3, random=False))
        def test(program: Any) -> None:
            check(program.function, program.inputs)

        def test_the_pattern() -> None:
            assert check(lambda x: x * torch.sigmoid(x), [torch.randn(3, 4)]) == 1
            assert check(lambda x: x * torch.sigmoid(x.clone() + 1), [torch.randn(3, 4)]) == 0

        self.tests, self.check = (test, test_the_pattern), check


def almost(x: Tensor) -> Tensor:
    """The sigmoid is that of another value."""
    return x * torch.sigmoid(x + 1)


def main() -> None:
    """Count lines, run both property tests, ask both why `almost` is left alone."""
    import graphopt

    for kind in (Graphopt, Inductor):
        body = inspect.getsource(kind).partition("def __init__(self) -> None:\n")[2].splitlines()
        written = [line for line in body if line.strip() and "self.tests" not in line]
        for test in kind().tests:
            test()
        print(f"{kind.__name__:9} {len(written):3} lines with the test; the tests pass")
    torch.compiler.reset()
    options: dict[str, Any] = {"target": "reference", "passes": [Graphopt().rewrite]}
    report = graphopt.explain(almost, torch.randn(3), options=options)
    (done,) = [each for each in report.graphs[0].passes if each.name == "recognize_silu"]
    print("why not, graphopt:", done.refusals[0].reason)
    print("why not, Inductor:", Inductor().check(almost, [torch.randn(3)]), "rewrites, and no word about it")


if __name__ == "__main__":
    main()
