"""Large pages under weights: what is moved, that nothing else changes, and when nothing is done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import graphopt
from graphopt.runtime import pages

LARGE = 2 << 20


@pytest.fixture(autouse=True)
def _ask_the_system_anew() -> Iterator[None]:
    forget = pages._is_wanted.cache_clear
    forget()
    yield
    forget()


def large_bytes(tensor: torch.Tensor) -> int:
    """How many bytes of large pages Linux counts in the mappings that hold the tensor."""
    begin, end, total, inside = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low < end and begin < high
        elif inside and first == "AnonHugePages:":
            total += int(line.split()[1]) * 1024
    return total


def test_weights_stay_what_and_where_they_are() -> None:
    weights = [torch.randn(1024, 1024) for _ in range(8)]
    before = [(weight.data_ptr(), weight.clone(), weight._version) for weight in weights]
    moved = pages.enlarge(weights)
    if moved == 0:
        pytest.skip("this system moves nothing onto large pages")
    for weight, (address, content, version) in zip(weights, before, strict=True):
        assert (weight.data_ptr(), weight._version) == (address, version)
        assert torch.equal(weight, content)
    assert moved * LARGE <= sum(weight.nbytes for weight in weights) * 4 / 3, "little memory is taken beside them"
    assert any(large_bytes(weight) for weight in weights)


def test_views_of_one_memory_count_once() -> None:
    memory = torch.zeros(LARGE // 8)  # half a page: twice a half would be a whole one
    assert pages.enlarge([memory, memory[:10], memory.view(2, -1)]) == 0


def test_what_has_no_memory_of_its_own_is_passed_over() -> None:
    with FakeTensorMode():
        fake = torch.zeros(4096, 4096)
    sparse = torch.eye(2000).to_sparse()
    assert pages.enlarge([fake, sparse, torch.zeros(4096, 4096, device="meta"), torch.zeros(0), torch.zeros(3)]) == 0


def test_a_system_that_does_not_want_them_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weight = torch.zeros(4 * LARGE, dtype=torch.uint8)
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    monkeypatch.setattr(pages, "_SETTING", tmp_path / "enabled")
    assert pages.enlarge([weight]) == 0
    pages._is_wanted.cache_clear()
    monkeypatch.setattr(pages, "_SETTING", tmp_path / "absent")
    assert pages.enlarge([weight]) == 0


def test_a_system_without_large_pages_is_not_asked_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(pages, "_is_wanted", lambda: True)
    monkeypatch.setattr(pages, "_collapse", lambda page: bool(asked.append(page)))
    assert pages.enlarge([torch.empty(100 * LARGE, dtype=torch.uint8)]) == 0
    assert len(asked) == pages._PATIENCE


def test_a_compiled_model_has_them() -> None:
    model = torch.nn.Linear(2048, 2048)
    if pages.enlarge(model.parameters()) == 0:
        pytest.skip("this system moves nothing onto large pages")
    before = graphopt.counters["large_pages"]
    x = torch.randn(2, 2048)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="graphopt", options={"target": "cpu"})(x), expected)
    assert graphopt.counters["large_pages"] > before
