"""Packs follow their weights: whatever way a weight changes, the next look-up is made from the new one."""

from __future__ import annotations

import gc

import pytest
import torch

from graphopt.runtime import packs


@pytest.fixture(params=["python", "compiled"])
def comparing(request, monkeypatch):
    """How snapshots are compared: as without a compiler on the machine, and as with one."""
    if request.param == "python":
        monkeypatch.setattr(packs, "_compare", [])
    else:
        request.getfixturevalue("cpp_library")
    return request.param


@pytest.fixture
def doubled():
    calls = []

    @packs.packed
    def double(weight, factor=2):
        calls.append(1)
        return weight * factor

    packs.refresh()
    yield double, calls
    packs.refresh()


def test_made_once_while_the_weight_is_the_same(doubled):
    double, calls = doubled
    weight = torch.ones(3)
    assert double(weight) is double(weight)
    assert len(calls) == 1


def test_in_place_update_makes_a_new_pack(doubled):
    double, _ = doubled
    weight = torch.nn.Parameter(torch.ones(3))
    double(weight)
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(double(weight), torch.full((3,), 4.0))


def test_data_swap_makes_a_new_pack(doubled):
    double, _ = doubled
    weight = torch.nn.Parameter(torch.ones(3))
    double(weight)
    weight.data = torch.full((3,), 5.0)
    assert torch.equal(double(weight), torch.full((3,), 10.0))


def test_inference_tensor_is_told_by_content(doubled):
    double, _ = doubled
    with torch.inference_mode():
        weight = torch.ones(3)
        assert torch.equal(double(weight), torch.full((3,), 2.0))
        weight.add_(1)
        assert torch.equal(double(weight), torch.full((3,), 4.0))


def test_constants_are_part_of_the_identity(doubled):
    double, _ = doubled
    weight = torch.ones(3)
    assert torch.equal(double(weight, 3), torch.full((3,), 3.0))
    assert torch.equal(double(weight, factor=4), torch.full((3,), 4.0))


def test_pack_dies_with_its_weight(doubled):
    double, _ = doubled
    weight = torch.ones(1000)
    double(weight)
    assert packs.packed_bytes() == 4000
    del weight
    gc.collect()
    assert packs.packed_bytes() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
@pytest.mark.parametrize("write", [lambda data: data.add_(1), lambda data: data[:, :24].zero_()])
def test_write_through_data_to_much_of_a_weight_is_seen(doubled, comparing, write, dtype):
    double, _ = doubled
    wide, tall, odd = torch.ones(64, 96, dtype=dtype), torch.ones(96, 64, dtype=dtype), torch.ones(3, 25, dtype=dtype)
    for weight in (wide, tall.t(), odd):
        weight = torch.nn.Parameter(weight, requires_grad=False)
        double(weight)
        snapshot = packs.Snapshot([weight], lambda: None)
        assert snapshot.holds([weight])
        write(weight.data)
        assert not snapshot.holds([weight])
        assert torch.equal(double(weight), weight * 2)


def test_small_write_through_data_is_seen_after_refresh(doubled):
    double, _ = doubled
    weight = torch.nn.Parameter(torch.ones(1000))
    before = double(weight)
    weight.data[998] = 3
    assert double(weight) is before
    packs.refresh()
    assert torch.equal(double(weight), weight * 2)


def test_snapshot_sees_every_kind_of_change_in_any_of_its_tensors(comparing):
    def weights():
        kinds = (torch.randn(5, 7), torch.randn(64).bfloat16(), torch.arange(3), torch.empty(0), torch.tensor(2.0))
        return [torch.nn.Parameter(each, requires_grad=False) for each in kinds]

    def swap(weight):
        weight.data = weight.data.clone()

    changes = {"counted": lambda weight: weight.add_(1), "data": lambda weight: weight.data.add_(1), "swapped": swap}
    for position in range(5):
        for name, change in changes.items():
            held = weights()
            snapshot = packs.Snapshot(held, lambda: None)
            assert snapshot.holds(held) and snapshot.holds(list(held))
            change(held[position])
            nothing_changed = held[position].numel() == 0 and name != "counted"
            assert snapshot.holds(held) == nothing_changed, (position, name)
    held = weights()
    snapshot = packs.Snapshot(held, lambda: None)
    assert not snapshot.holds([held[0].detach(), *held[1:]]), "another tensor on the same memory"
    packs.refresh()
    assert not snapshot.holds(held)


def test_a_change_in_any_of_many_tensors_is_seen(comparing):
    """Threads share them: the samples of each are where its own state says, also in tensors without any."""
    sizes = [0 if number % 7 == 3 else 1 + number % 40 for number in range(150)]
    held = [torch.nn.Parameter(torch.randn(size), requires_grad=False) for size in sizes]
    snapshot = packs.Snapshot(held, lambda: None)
    assert snapshot.holds(held)
    for weight in held:
        before = weight.clone()
        weight.data.add_(1)
        assert snapshot.holds(held) == (weight.numel() == 0)
        weight.data.copy_(before)
        assert snapshot.holds(held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64])
def test_snapshot_of_inference_tensors_is_told_by_content(comparing, dtype):
    changes = (lambda t: t.zero_(), lambda t: t[1:2].zero_(), lambda t: t.copy_(t.flip(0)))
    with torch.inference_mode():
        for change in changes:
            for values in (torch.ones(4, 6), torch.tensor([1, 1, 0, 1, 0]), torch.ones(5).expand(4, 5).clone()):
                held = [torch.ones(3), values.to(dtype)]
                before = held[1].clone()
                snapshot = packs.Snapshot(held, lambda: None)
                assert snapshot.holds(held)
                change(held[1])
                assert snapshot.holds(held) == torch.equal(held[1], before)


def test_snapshot_of_views_reads_their_own_elements(comparing):
    base = torch.nn.Parameter(torch.zeros(100, 40), requires_grad=False)
    held = [base[20:60].t(), base[60:, ::2], base[:20, 7]]
    snapshot = packs.Snapshot(held, lambda: None)
    assert snapshot.holds(held)
    base.data[60:] = 1
    assert not snapshot.holds(held)
