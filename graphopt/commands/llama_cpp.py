"""llama.cpp as a system of the benchmark: the same model out of a GGUF file, called as transformers' models are.

The file is the one that the model was loaded from, or is written here from the loaded weights. For a Llama the two
differ from transformers in the rows of queries and keys, which llama.cpp wants with the pairs that a rotary embedding
turns beside each other (`LlamaModel.permute` of its convert_hf_to_gguf.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch

from graphopt.errors import GraphoptError, OptionError

_ROOM = 512  # tokens that can follow a prompt


class LlamaCpp:
    """Runs the model's forward call by llama.cpp; all else that is asked of the model, the model itself answers.

    file: the model's own .gguf file; with None one is written, its matrices in blocks of the kind `weights`, one of
    `systems.WRITTEN`.
    """

    def __init__(self, model: Any, file: Path | None, weights: str) -> None:
        import llama_cpp.llama_cpp as library

        self._library, self._model, self._context, self._room = library, model, None, (0, 0)
        self._silence = library.llama_log_callback(lambda *said: None)
        library.llama_log_set(self._silence, None)
        library.llama_backend_init()
        with tempfile.TemporaryDirectory(prefix="graphopt-gguf-") as folder:
            path = file or Path(folder, "model.gguf")
            if file is None:
                write_gguf(model, path, weights)
            self._loaded = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if not self._loaded:
            raise GraphoptError(f"llama.cpp does not load {str(path)!r}")
        self._words = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._loaded))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **others: object) -> SimpleNamespace:
        """The logits [rows, 1, vocabulary] after the last of the given tokens [rows, length]. A call with position 0
        begins anew; llama.cpp keeps the keys and values."""
        library, (rows, length) = self._library, input_ids.shape
        if position_ids[0, 0] == 0:
            self._begin(rows, length)
        places = position_ids.flatten().tolist()
        if max(places) >= self._room[1]:
            prompt = self._room[1] - _ROOM
            raise GraphoptError(f"llama.cpp has room for {self._room[1]} tokens, {_ROOM} behind the prompt of {prompt}")
        batch = library.llama_batch_init(rows * length, 0, 1)
        batch.n_tokens = rows * length
        for index, (token, position) in enumerate(zip(input_ids.flatten().tolist(), places, strict=True)):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, index // length
            batch.logits[index] = (index + 1) % length == 0
        code = library.llama_decode(self._context, batch)
        library.llama_batch_free(batch)
        if code:
            raise GraphoptError(f"llama.cpp failed with code {code} on {rows} rows of {length} tokens")
        last = [library.llama_get_logits_ith(self._context, (row + 1) * length - 1) for row in range(rows)]
        logits = numpy.stack([numpy.ctypeslib.as_array(row, (self._words,)) for row in last])
        return SimpleNamespace(logits=torch.from_numpy(logits)[:, None])

    forward = __call__

    def _begin(self, rows: int, length: int) -> None:
        library, room = self._library, length + _ROOM
        if self._context and self._room[0] == rows and self._room[1] >= room:
            library.llama_memory_clear(library.llama_get_memory(self._context), True)
            return
        if self._context:
            library.llama_free(self._context)
        settings = library.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.n_batch = rows * room, rows, rows * length
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._context, self._room = library.llama_init_from_model(self._loaded, settings), (rows, room)


def write_gguf(model: Any, path: Path, kind: str) -> None:
    """Write a Llama of transformers as a GGUF file whose matrices have blocks of `kind`, without a tokenizer.

    Raises OptionError for another architecture, or for rows that are no whole number of blocks.
    """
    import gguf

    config = model.config
    rotary = config.rope_parameters if config.model_type == "llama" else {"rope_type": config.model_type}
    if rotary["rope_type"] != "default":
        raise OptionError(f"only plain Llamas are written for llama.cpp, not {rotary['rope_type']!r}")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rotary["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    blocks = gguf.GGMLQuantizationType[kind]
    for name, weight in _weights(model):
        given = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if given is None:
            raise OptionError(f"{name!r} has no name in a GGUF file")
        values = weight.float().numpy()
        if values.ndim == 1:
            writer.add_tensor(given, values)
            continue
        try:
            writer.add_tensor(given, gguf.quants.quantize(values, blocks), raw_dtype=blocks)
        except gguf.quants.QuantError as error:
            raise OptionError(f"{name!r} can't be written in {kind}: {error}") from error
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters, tied ones once, with the rows of queries and keys in llama.cpp's order."""
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if count := heads.get(name.split(".")[-2]):
            weight = weight.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        yield name, weight
