"""Caches in forms of their own read as plain tensors, and everything people do with caches keeps or leaves the form."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graphopt.runtime.kv_tensor import CacheTensor
from tests.kv import forms
from tests.kv.forms import PAGED, Form, rows

FORMS = (PAGED, forms.quantized("int8", True), forms.quantized("int4", False))
EACH_FORM = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
CHANGES = {
    "reorder": lambda cache: cache.index_select(0, torch.tensor([1, 0, 1])),
    "repeat": lambda cache: cache.repeat_interleave(2, dim=0),
    "select": lambda cache: cache[torch.tensor([1]), ...],
    "clone": lambda cache: cache.clone(),
    "deepcopy": copy.deepcopy,
}


@EACH_FORM
@pytest.mark.parametrize("length", [160, 150, 145, 128, 120, 64, 30, 5, 1, 0])
def test_cropped_cache_grows_and_leaves_the_other_alone(form: Form, length: int) -> None:
    cache = form.of(rows(160))
    kept = cache.plain()
    cropped = cache[..., :length, :]
    assert isinstance(cropped, form.kind) and torch.equal(cropped.plain(), kept[:, :, :length])
    for count in (1, 12):
        new = rows(count)
        grown = form.append(cropped, new)
        assert torch.equal(grown.plain()[:, :, :length], kept[:, :, :length])
        assert torch.equal(grown.plain()[:, :, length:], new)
    assert torch.equal(cache.plain(), kept)


@EACH_FORM
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_caches_do_keeps_the_form(form: Form, change: Callable[[Tensor], Tensor]) -> None:
    cache = form.of(rows(130))
    changed = change(cache)
    assert isinstance(changed, form.kind) and torch.equal(changed.plain(), change(cache.plain()))
    new = rows(1, batch=changed.shape[0])
    assert torch.equal(form.append(changed, new).plain()[:, :, 130:], new)


@EACH_FORM
def test_other_operations_see_a_plain_tensor(form: Form) -> None:
    cache = form.of(rows(100))
    plain = cache.plain()
    for operation in (
        lambda x: x * 2,
        lambda x: x[0],
        lambda x: torch.cat([x, x], 2),
        lambda x: x[:, :, -3:],
        torch.sum,
    ):
        assert type(operation(cache)) is Tensor and torch.equal(operation(cache), operation(plain))
    assert cache.shape == plain.shape and cache.dtype == plain.dtype and len(cache) == len(plain)
    assert repr(plain)[7:40] in repr(cache) and cache.tolist() == plain.tolist()
    assert (cache.numpy() == plain.numpy()).all()


@EACH_FORM
def test_saved_as_a_plain_tensor(form: Form) -> None:
    cache, file = form.of(rows(100)), io.BytesIO()
    torch.save({"keys": cache}, file)
    file.seek(0)
    loaded = torch.load(file)["keys"]
    assert type(loaded) is Tensor and torch.equal(loaded, cache.plain())


@EACH_FORM
@pytest.mark.parametrize(
    "write",
    [
        lambda cache: cache.zero_(),
        lambda cache: cache.__setitem__(0, 1.0),
        lambda cache: torch.add(cache.plain(), 1, out=cache),
        lambda cache: cache.data.mul_(2),
        lambda cache: cache.detach().copy_(cache),
    ],
    ids="zero setitem out data detach".split(),
)
def test_writes_are_refused(form: Form, write: Callable[[Tensor], object]) -> None:
    cache = form.of(rows(100))
    with pytest.raises(TypeError, match="(paged|quantised) KV cache.*plain"):
        write(cache)


@EACH_FORM
def test_inference_mode_and_back(form: Form) -> None:
    with torch.inference_mode():
        cache = form.append(form.of(rows(20)), rows(20))
    expected = cache.plain()
    new = rows(40)
    grown = form.append(cache, new).plain()
    assert torch.equal(grown[:, :, -15:], new[:, :, -15:]) and (
        not form.exact or torch.equal(grown[:, :, :40], expected)
    )


@EACH_FORM
def test_threads_that_continue_one_cache(form: Form) -> None:
    cache, news = form.of(rows(64, batch=1)), [rows(200, batch=1) for _ in range(4)]
    kept, found = cache.plain(), {}

    def followed(number: int) -> Tensor:
        grown: CacheTensor = cache
        for index in range(200):
            grown = form.append(grown, news[number][:, :, index : index + 1])
        return grown.plain()

    def follow(number: int) -> None:
        found[number] = followed(number)

    alone = [followed(number) for number in range(4)]
    threads = [threading.Thread(target=follow, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(cache.plain(), kept)
    for number, new in enumerate(news):
        assert torch.equal(found[number], alone[number])
        assert not form.exact or torch.equal(alone[number], torch.cat([kept, new], 2))
