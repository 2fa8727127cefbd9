"""Packs follow their weights: whatever way a weight changes, the next look-up is made from the new one."""

from __future__ import annotations

import gc

import pytest
import torch

from graphopt.runtime import packs


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
def test_write_through_data_to_much_of_a_weight_is_seen(doubled, write, dtype):
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
