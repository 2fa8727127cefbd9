"""Tiny random models of many architectures, and what is checked of each through the backend."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.suite import compare, door

VOCABULARY = 96
# Heads of 16 with two key/value heads for four query heads, wherever the architecture has them.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**WIDE, "vocab_size": VOCABULARY, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
           "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "vocab_size": VOCABULARY}

Inputs = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How to build a tiny model, and inputs for it; `generates` names the caches its generate takes."""

    name: str
    build: Callable[[], torch.nn.Module]
    inputs: Callable[[int], Inputs]
    generates: tuple[str, ...] = ()
    left_padding: bool = False

    @functools.cached_property
    def checks(self) -> tuple[str, ...]:
        """The checks that apply."""
        padded = ("left_padding",) if self.left_padding else ()
        return ("forward", "second_batch", "bfloat16", "backward", *padded, *self.generates)


def _ids(rows: int, length: int = 11) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))


def _text(rows: int) -> Inputs:
    return {"input_ids": _ids(rows)}


def _pixels(rows: int) -> Inputs:
    return {"pixel_values": torch.randn(rows, 3, 16, 16)}


def _pair(rows: int) -> Inputs:
    return {"input_ids": _ids(rows), "decoder_input_ids": _ids(rows, 5)}


def _image_and_text(rows: int) -> Inputs:
    return {**_pixels(rows), **_text(rows)}


def _speech(rows: int) -> Inputs:
    return {"input_features": torch.randn(rows, 8, 32), "decoder_input_ids": _ids(rows, 5)}


def _features(rows: int) -> Inputs:
    return {"x": torch.randn(rows, 7, 16)}


def _hugging_face(model: str, config: str, **sizes: Any) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        return getattr(transformers, model)(getattr(transformers, config)(**sizes))

    return build


class Perceptron(torch.nn.Module):
    """A plain stack of linears."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(16, 48), torch.nn.ReLU(), torch.nn.Linear(48, 48), torch.nn.Tanh(), torch.nn.Linear(48, 5)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., 16] -> [..., 5]."""
        return self.layers(x)


class Recurrent(torch.nn.Module):
    """A two-layer LSTM with a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(16, 24, num_layers=2, batch_first=True)
        self.head = torch.nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, 16] -> [B, T, 5] and the last hidden state."""
        states, (hidden, _) = self.lstm(x)
        return self.head(states), hidden


def _decoder(name: str, model: str, config: str, caches: tuple[str, ...] = ("dynamic_cache", "static_cache"),
             **sizes: Any) -> Architecture:  # fmt: skip
    return Architecture(name, _hugging_face(model, config, **sizes), _text, caches, left_padding=True)


def _other(name: str, model: str, config: str, inputs: Callable[[int], Inputs], caches: tuple[str, ...] = (),
           **sizes: Any) -> Architecture:  # fmt: skip
    return Architecture(name, _hugging_face(model, config, **sizes), inputs, caches)


_GEMMA3_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
_SHORT = {"n_layer": 2, "n_head": 4, **ENDS}
_ENCODER = {**WIDE, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
_TOWER = {**WIDE, "num_hidden_layers": 1}
_SEQ2SEQ = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, **ENDS,
            "decoder_start_token_id": 2, "forced_eos_token_id": None}  # fmt: skip

ARCHITECTURES = (
    _decoder("llama", "LlamaForCausalLM", "LlamaConfig", **DECODER),
    _decoder("mistral", "MistralForCausalLM", "MistralConfig", **DECODER, sliding_window=6),
    _decoder("qwen2", "Qwen2ForCausalLM", "Qwen2Config", **DECODER),
    _decoder("qwen3", "Qwen3ForCausalLM", "Qwen3Config", **DECODER),
    _decoder("gemma2", "Gemma2ForCausalLM", "Gemma2Config", **DECODER, sliding_window=6, query_pre_attn_scalar=16),
    _decoder("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", **DECODER, **_GEMMA3_LAYERS, sliding_window=6),
    _decoder("phi3", "Phi3ForCausalLM", "Phi3Config", **DECODER),
    _decoder("gpt2", "GPT2LMHeadModel", "GPT2Config", **_SHORT, n_embd=64, n_positions=128),
    _decoder("neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", **WIDE, **ENDS, max_position_embeddings=128),
    _decoder("falcon", "FalconForCausalLM", "FalconConfig", **{**WIDE, **ENDS}, multi_query=True),
    _decoder(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        **WIDE,
        **ENDS,
        ffn_dim=96,
        word_embed_proj_dim=64,
        max_position_embeddings=128,
    ),  # fmt: skip
    _decoder("bloom", "BloomForCausalLM", "BloomConfig", **_SHORT, hidden_size=64),
    _decoder(
        "mpt",
        "MptForCausalLM",
        "MptConfig",
        ("dynamic_cache",),
        d_model=64,
        n_layers=2,
        n_heads=4,
        max_seq_len=128,
        **ENDS,
    ),  # fmt: skip
    _decoder("olmo2", "Olmo2ForCausalLM", "Olmo2Config", **DECODER),
    _decoder(
        "granite",
        "GraniteForCausalLM",
        "GraniteConfig",
        **DECODER,
        attention_multiplier=0.2,
        residual_multiplier=0.5,
        logits_scaling=2.0,
        embedding_multiplier=3.0,
    ),  # fmt: skip
    _decoder("mixtral", "MixtralForCausalLM", "MixtralConfig", **DECODER, **EXPERTS, num_local_experts=4),
    _decoder(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        **DECODER,
        **EXPERTS,
        num_experts=4,
        moe_intermediate_size=32,
    ),  # fmt: skip
    _other(
        "mamba",
        "MambaForCausalLM",
        "MambaConfig",
        _text,
        ("own_cache",),
        hidden_size=32,
        state_size=4,
        num_hidden_layers=2,
        **ENDS,
    ),  # fmt: skip
    _other(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        _pair,
        ("dynamic_cache",),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        **ENDS,
    ),  # fmt: skip
    _other("bart", "BartForConditionalGeneration", "BartConfig", _pair, ("dynamic_cache",), **_SEQ2SEQ),
    _other("bert", "BertModel", "BertConfig", _text, **_ENCODER),
    _other("roberta", "RobertaModel", "RobertaConfig", _text, **_ENCODER),
    _other(
        "distilbert",
        "DistilBertModel",
        "DistilBertConfig",
        _text,
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    ),  # fmt: skip
    _other("vit", "ViTModel", "ViTConfig", _pixels, **WIDE, image_size=16, patch_size=8),
    _other(
        "clip",
        "CLIPModel",
        "CLIPConfig",
        _image_and_text,
        projection_dim=16,
        text_config={**_TOWER, **ENDS, "eos_token_id": 2, "max_position_embeddings": 16},
        vision_config={**_TOWER, "image_size": 16, "patch_size": 8},
    ),  # fmt: skip
    _other(
        "whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _speech,
        **_SEQ2SEQ,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
    ),  # fmt: skip
    Architecture("lstm", Recurrent, _features),
    Architecture("mlp", Perceptron, _features),
)
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def check(name: str, kind: str, *, target: str | None = None, **options: Any) -> None:
    """Raise unless the architecture does what eager does; `kind` is one of its `checks`."""
    architecture = BY_NAME[name]
    door.fresh()
    torch.manual_seed(0)
    model = architecture.build().eval()
    if kind == "backward":
        _check_gradients(model, architecture, target, options)
    elif kind.endswith("_cache"):
        _check_generation(model, kind, architecture, target, options)
    else:
        with torch.no_grad():
            _check_forward(model, kind, architecture, target, options)


def _check_forward(model: torch.nn.Module, kind: str, architecture: Architecture, target: str | None,
                   options: dict[str, Any]) -> None:  # fmt: skip
    batches = [architecture.inputs(2)]
    if kind == "second_batch":
        batches += [architecture.inputs(3), architecture.inputs(5), architecture.inputs(2)]
    if kind == "left_padding":
        batches = [_padded(batch) for batch in (architecture.inputs(2), architecture.inputs(3))]
    if kind == "bfloat16":
        model = model.to(torch.bfloat16)
        batches = [{name: _to_bfloat16(value) for name, value in batch.items()} for batch in batches]
    exact = copy.deepcopy(model).double()
    subject = door.compiled(model, target=target, **options)
    for batch in batches:
        want = _visible(model(**copy.deepcopy(batch)), batch)
        got = _visible(subject(**copy.deepcopy(batch)), batch)
        compare.assert_same(got, want, strides=False, oracle=functools.partial(_in_float64, exact, batch))


def _check_gradients(model: torch.nn.Module, architecture: Architecture, target: str | None,
                     options: dict[str, Any]) -> None:  # fmt: skip
    batch = architecture.inputs(2)
    twin = copy.deepcopy(model)
    subject = door.compiled(model, target=target, **options)
    for run in (subject, twin):
        outputs = [value for value in compare.tensors_in(_values(run(**copy.deepcopy(batch)))) if value.requires_grad]
        weighted = [value * torch.linspace(0.5, 1.5, value.numel()).reshape(value.shape) for value in outputs]
        torch.stack([value.mean() for value in weighted]).sum().backward()
    for (name, got), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (got.grad is None) == (want.grad is None), name
        if got.grad is not None:
            say = functools.partial("{}: {}".format, name)
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-5, msg=say)


def _check_generation(model: Any, kind: str, architecture: Architecture, target: str | None,
                      options: dict[str, Any]) -> None:  # fmt: skip
    batch = {name: value for name, value in architecture.inputs(2).items() if name != "decoder_input_ids"}
    if architecture.left_padding:
        batch = _padded(batch)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    if kind == "static_cache":
        settings["cache_implementation"] = "static"
    settings.update(return_dict_in_generate=True, output_logits=True)
    want = model.generate(**copy.deepcopy(batch), **settings)
    subject = copy.deepcopy(model)
    subject.forward = door.compiled(subject.forward, target=target, **options)
    got = subject.generate(**copy.deepcopy(batch), **settings)
    if not torch.equal(got.sequences, want.sequences):
        raise compare.Mismatch("value", f"tokens {got.sequences.tolist()}, eager {want.sequences.tolist()}")
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-3, atol=1e-4)


def _padded(batch: Inputs) -> Inputs:
    """The batch with the first row padded on the left by three, and the mask that says so."""
    ids = batch["input_ids"].clone()
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    return {**batch, "input_ids": ids, "attention_mask": mask}


def _to_bfloat16(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.bfloat16) if value.is_floating_point() else value


def _values(outputs: Any) -> Any:
    """Logits or hidden states; caches are left out, they are the model's own business and generate tests them."""
    if isinstance(outputs, transformers.utils.ModelOutput):
        return [value for value in outputs.to_tuple() if isinstance(value, torch.Tensor)]
    return outputs


def _visible(outputs: Any, batch: Inputs) -> Any:
    """What of the outputs has a meaning: not the rows of padding."""
    values = _values(outputs)
    if "attention_mask" not in batch:
        return values
    kept = batch["attention_mask"].bool()
    return [value[kept] if value.shape[:2] == kept.shape else value for value in values]


def _in_float64(exact: torch.nn.Module, batch: Inputs) -> Any:
    wide = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    return _visible(exact(**wide), batch)
