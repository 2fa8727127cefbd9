"""Tiny models with an encoder, whose decoders keep a second cache: that of cross-attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tests.kv import scenarios

_SIZES = {"vocab_size": scenarios.VOCABULARY, "d_model": 32, "pad_token_id": 0, "decoder_start_token_id": 1}
_LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
_WIDTHS = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "bos_token_id": 1, "eos_token_id": 2}


def t5() -> Any:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(d_kv=8, d_ff=64, num_layers=1, num_heads=4, **_SIZES)).eval()


def bart() -> Any:
    torch.manual_seed(0)
    sizes = {**_SIZES, **_LAYERS, **_WIDTHS}
    return BartForConditionalGeneration(
        BartConfig(max_position_embeddings=64, forced_eos_token_id=None, **sizes)
    ).eval()


def whisper() -> Any:
    torch.manual_seed(0)
    sizes = {**_SIZES, **_LAYERS, **_WIDTHS, "num_mel_bins": 8}
    return WhisperForConditionalGeneration(
        WhisperConfig(max_source_positions=20, max_target_positions=64, **sizes)
    ).eval()


MODELS: dict[str, Callable[[], Any]] = {"t5": t5, "bart": bart, "whisper": whisper}


def inputs(name: str, length: int = 9) -> torch.Tensor:
    """Tokens, or for Whisper the features of its 20 positions."""
    return torch.randn(1, 8, 40) if name == "whisper" else scenarios.prompt(length)
