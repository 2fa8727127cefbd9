"""Checkpoints that others quantised: their codes are taken as they are, by the documented layouts, or refused."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import graphopt
from graphopt.backend import graphopt as backend
from graphopt.errors import OptionError, StoredFileError
from graphopt.quantization import schemes
from graphopt.runtime import packs

IDS = torch.arange(12).reshape(2, 6)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 128)
        self.up = nn.Linear(128, 64)
        self.down = nn.Linear(64, 128, bias=False)
        self.head = nn.Linear(128, 32, bias=False)
        self.register_buffer("shift", torch.ones(128))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids) + self.down(torch.relu(self.up(self.embed(ids) + self.shift))))


def packed_words(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Eight codes of each row to a word, code order[i] in nibble i, one at a time."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for word in range(words.shape[1]):
        for nibble, place in enumerate(order):
            words[:, word] |= codes[:, 8 * word + place].long() << (4 * nibble)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


STRAIGHT, INTERLEAVED = tuple(range(8)), (0, 2, 4, 6, 1, 3, 5, 7)


def gptq(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    return {
        "qweight": packed_words(codes, STRAIGHT).t().contiguous(),
        "qzeros": packed_words((zeros - 1).t() & 15, STRAIGHT),
        "scales": scales.t().half().contiguous(),
        "g_idx": (torch.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])).int(),
    }


def awq(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    return {
        "qweight": packed_words(codes.t(), INTERLEAVED),
        "qzeros": packed_words(zeros.t(), INTERLEAVED),
        "scales": scales.t().half().contiguous(),
    }


def compressed(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    stored = {
        "weight_packed": packed_words(codes, STRAIGHT),
        "weight_scale": scales.half(),
        "weight_shape": torch.tensor(codes.shape),
    }
    if (zeros != 8).any():
        stored["weight_zero_point"] = packed_words(zeros.t(), STRAIGHT).t().contiguous()
    return stored


FORMATS: dict[str, tuple[Callable[..., dict[str, Tensor]], dict[str, object]]] = {
    "gptq": (gptq, {"bits": 4}),
    "awq": (awq, {"bits": 4, "version": "GEMM"}),
    "compressed-tensors": (compressed, {"format": "pack-quantized"}),
}


def write(folder: Path, method: str, group: int, symmetric: bool, **changed: Tensor) -> Model:
    """A checkpoint of `Model`; returned is the model that it stands for."""
    torch.manual_seed(0)
    pack, config = FORMATS[method]
    model = Model().eval()
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name in ("up", "down"):
        weight = tensors.pop(f"{name}.weight")
        rows, columns = weight.shape
        size = min(group, columns)
        codes = torch.randint(0, 16, (rows, columns))
        zeros = torch.full((rows, columns // size), 8) if symmetric else torch.randint(1, 15, (rows, columns // size))
        scales = (torch.rand(zeros.shape) * 0.02 + 0.001).half().float()
        values = ((codes - zeros.repeat_interleave(size, 1)) * scales.repeat_interleave(size, 1)).float()
        tensors.update({f"{name}.{part}": value for part, value in pack(codes, zeros, scales).items()})
        with torch.no_grad():
            model.get_parameter(f"{name}.weight").copy_(values)
    tensors.update(changed)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method, **config}}))
    return model


def packed_values(model: nn.Module, quantize: graphopt.Quantize, name: str) -> Tensor:
    """What the pack of the named weight stands for."""
    weight = model.get_parameter(name)
    (made,) = packs.made_from(weight)
    return schemes.named(dict(quantize.assigned)[name]).unpack(made.result, weight.shape[1])


@pytest.mark.parametrize("method", list(FORMATS))
@pytest.mark.parametrize(("group", "symmetric"), [(32, False), (64, True), (128, False)])
def test_codes_are_taken_as_they_are(method: str, group: int, symmetric: bool, tmp_path: Path) -> None:
    original = write(tmp_path, method, group, symmetric)
    with torch.device("meta"):
        model = Model().eval()
    quantize = graphopt.load_checkpoint(model, tmp_path)
    ending = "-sym" if symmetric else ""
    assert dict(quantize.assigned)["up.weight"] == f"int4-g{group}{ending}"
    assert dict(quantize.assigned)["head.weight"] == ""
    assert model.up.weight.untyped_storage().nbytes() == 64 * 4  # never there in full
    for name in ("up.weight", "down.weight"):
        # Where zeros differ, -z * s is rounded to float16.
        rounding = 0.0 if symmetric else 15 * 0.021 * 2**-11
        torch.testing.assert_close(
            packed_values(model, quantize, name), original.get_parameter(name).data, rtol=1e-6, atol=rounding
        )
    for name in ("head.weight", "embed.weight", "up.bias", "shift"):
        assert torch.equal(operator.attrgetter(name)(model), operator.attrgetter(name)(original))


def test_a_model_on_the_meta_device_answers(tmp_path: Path) -> None:
    original = write(tmp_path, "awq", 64, True)
    with torch.device("meta"):
        model = Model().eval()
    quantize = graphopt.load_checkpoint(model, tmp_path)
    with torch.no_grad():
        program = torch.compile(model, backend=backend, options={"quantize": quantize, "target": "inductor"})
        torch.testing.assert_close(program(IDS), original(IDS), rtol=1e-4, atol=1e-4)


def test_the_layout_is_that_of_compressed_tensors_itself(tmp_path: Path) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 16, (24, 64))
    packed = helpers.pack_to_int32((codes - 8).to(torch.int8), 4)
    assert torch.equal(packed, packed_words(codes, STRAIGHT))


def test_eight_bits_with_one_scale_to_a_row(tmp_path: Path) -> None:
    codes, scale = torch.randint(-127, 128, (32, 128)).to(torch.int8), torch.rand(32, 1) * 0.01
    tensors = {"head.weight": codes, "head.weight_scale": scale}
    write(tmp_path, "compressed-tensors", 64, True, **tensors)
    model = Model()
    quantize = graphopt.load_checkpoint(model, tmp_path)
    assert dict(quantize.assigned)["head.weight"] == "int8"
    torch.testing.assert_close(packed_values(model, quantize, "head.weight"), codes * scale)


def test_a_group_may_be_a_whole_row_or_wide(tmp_path: Path) -> None:
    original = write(tmp_path, "gptq", 1024, True)
    model = Model().eval()
    quantize = graphopt.load_checkpoint(model, tmp_path)
    assert dict(quantize.assigned)["up.weight"] == "int4-g128-sym"
    torch.testing.assert_close(packed_values(model, quantize, "up.weight"), original.up.weight.data)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"up.g_idx": torch.arange(128).flip(0).int() // 64}, "out of order"),
        ({"up.scales": torch.ones(3, 5).half()}, r"'up(\.weight)?'"),
        ({"up.scales": torch.full((2, 64), torch.inf).half()}, "not finite"),
        ({"up.qzeros": torch.ones(3, 8).int()}, r"'up(\.weight)?'"),
        ({"embed.weight": torch.ones(3, 128)}, r"'embed.weight' is \[3, 128\]"),
        ({"up.qweight": torch.ones(3, 8).int()}, r"'up(\.weight)?'"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    write(tmp_path, "gptq", 64, False, **changed)
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(StoredFileError, match=message):
        graphopt.load_checkpoint(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_methods_bits_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoredFileError, match="no config.json"):
        graphopt.load_checkpoint(Model(), tmp_path)
    write(tmp_path, "gptq", 64, True)
    for config, message in (
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is none of gptq, awq, compressed-tensors"),
        ({"quant_method": "gptq", "bits": 3}, "has 3 bits"),
        (None, "names no quantization_config"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        with pytest.raises(StoredFileError, match=message):
            graphopt.load_checkpoint(Model(), tmp_path)
    write(tmp_path, "awq", 64, True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StoredFileError, match="is damaged"):
        graphopt.load_checkpoint(Model(), tmp_path)
    file.unlink()
    with pytest.raises(StoredFileError, match="holds no safetensors"):
        graphopt.load_checkpoint(Model(), tmp_path)


def test_a_checkpoint_of_plain_weights_is_no_quantised_one(tmp_path: Path) -> None:
    write(tmp_path, "gptq", 64, True)
    save_file({name: value.detach() for name, value in Model().state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(OptionError, match="no quantised weight of a linear of Model"):
        graphopt.load_checkpoint(Model(), tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(StoredFileError):
        graphopt.load_checkpoint(Model(), tmp_path)
