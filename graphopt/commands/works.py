"""The works that a benchmark times: decode and prefill, driven as `generate` drives them, and encode.

A work is made on a loaded model, checked once (`check`, which compiles), then stepped as often as wanted.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Protocol

import numpy
import torch

from graphopt.commands.figures import Cost

Tokens = numpy.ndarray[Any, numpy.dtype[numpy.int64]]
Values = numpy.ndarray[Any, numpy.dtype[numpy.float32]]

WORKS = ("decode", "prefill", "encode")

_PROSE = (
    "A compiler reads a program and writes another one that does the same work with less effort. The best "
    "of them are patient: they look at every value, ask where it comes from and who will need it, and keep "
    "only what matters. In the valley below the old mill, the river turned slowly between the fields, and "
    "each spring it carried away a little of the bank, so that the map in the town hall was never quite "
    "right. Nobody minded; they knew the way. "
)


@dataclasses.dataclass(frozen=True)
class WorkRequest:
    """What to run. length: tokens of context, prompt or each text. checked: decoded tokens to compare."""

    kind: str
    batch: int
    length: int
    checked: int
    static_cache: bool
    tokens: list[list[int]] | None = None  # the prompt, where the caller has one; else the prose above
    room: int = 0  # rows of a static cache, where it should be longer than what is decoded


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a system was given (ids [rows, steps]) and answered (logits or outputs [rows, steps, size])."""

    given: Tokens
    values: Values
    seconds: tuple[float, ...]  # of each call, the compiling ones included

    @property
    def chosen(self) -> Tokens:
        """The largest value's place: the greedy token."""
        chosen: Tokens = self.values.argmax(axis=-1)
        return chosen


class Work(Protocol):
    """One work on one model."""

    def check(self, forced: Tokens | None) -> Answers:
        """Run from the start; decode is fed the `forced` tokens, not its own, so that every step compares."""

    def begin(self) -> None:
        """Get ready for `step`, compiling nothing that `check` has not compiled."""

    def step(self) -> float:
        """Do one step; returns its seconds."""

    def cost(self) -> Cost:
        """The least that one step must do."""


def make_work(model: Any, tokenizer: Any, request: WorkRequest) -> Work:
    """The work that `request` describes, on `model`."""
    kinds: dict[str, type[Decode] | type[Prefill] | type[Encode]] = {
        "decode": Decode,
        "prefill": Prefill,
        "encode": Encode,
    }
    ids = _input_ids(model, tokenizer, request)
    return kinds[request.kind](model, ids, request)


class Decode:
    """Token by token after a context, through the model's cache, with the arguments of `generate`."""

    def __init__(self, model: Any, ids: torch.Tensor, request: WorkRequest) -> None:
        self.model, self.ids, self.request = model, ids, request
        room = request.length + request.checked
        self.steps_left, self.room = 0, -(-room // 64) * 64
        self.next: torch.Tensor
        self.static = _static_cache(model, max(self.room, request.room)) if request.static_cache else None

    def check(self, forced: Tokens | None) -> Answers:
        self.begin()
        given, values, seconds = [], [], []
        for index in range(self.request.checked):
            if forced is not None:
                self.next = torch.from_numpy(forced[:, index : index + 1].copy())
            given.append(self.next)
            seconds.append(self.step())
            values.append(self.logits.float())
        return Answers(torch.cat(given, dim=1).numpy(), torch.stack(values, dim=1).numpy(), tuple(seconds))

    def begin(self) -> None:
        """Fill a cache with the context, by the model as it is: what is timed is decode alone."""
        self.cache = _fresh_cache(self.model, self.static)
        self.position, self.steps_left = self.ids.shape[1], self.room - self.ids.shape[1]
        positions = torch.arange(self.position).expand_as(self.ids)
        with torch.no_grad():
            self.logits = _logits(self.model.forward, self.ids, positions, self.cache)
        self.next = self.logits.argmax(-1, keepdim=True)

    def step(self) -> float:
        if self.steps_left == 0:
            self.begin()
        self.steps_left -= 1
        positions = torch.full_like(self.next, self.position)
        with torch.no_grad():
            started = time.perf_counter()
            self.logits = _logits(self.model, self.next, positions, self.cache)
            self.next = self.logits.argmax(-1, keepdim=True)
            seconds = time.perf_counter() - started
        self.position += 1
        return seconds

    def cost(self) -> Cost:
        keys = self.ids.shape[1] + self.request.checked // 2
        cache = _cache_bytes(self.model, self.request.batch, keys)
        flops = _flops(self.model, self.request.batch, 1, keys, head_rows=1)
        return Cost(_weights_read(self.model) + cache, flops, self.request.batch, cache)


class Prefill:
    """A whole prompt into an empty cache, for the logits of its last token."""

    def __init__(self, model: Any, ids: torch.Tensor, request: WorkRequest) -> None:
        self.model, self.ids, self.request = model, ids, request
        self.static = _static_cache(model, -(-request.length // 64) * 64) if request.static_cache else None
        self.positions = torch.arange(ids.shape[1]).expand_as(ids)

    def check(self, forced: Tokens | None) -> Answers:
        seconds = [self.step() for _ in range(2)]
        return Answers(self.ids.numpy(), self.logits.float()[:, None].numpy(), tuple(seconds))

    def begin(self) -> None:
        """Nothing is carried from step to step."""

    def step(self) -> float:
        cache = _fresh_cache(self.model, self.static)
        with torch.no_grad():
            started = time.perf_counter()
            self.logits = _logits(self.model, self.ids, self.positions, cache)
            return time.perf_counter() - started

    def cost(self) -> Cost:
        batch, length = self.ids.shape
        flops = _flops(self.model, batch, length, length / 2, head_rows=1)
        return Cost(_weights_read(self.model), flops, batch * length)


class Encode:
    """A batch of whole texts through an encoder (or any model that takes input_ids and an attention mask)."""

    def __init__(self, model: Any, ids: torch.Tensor, request: WorkRequest) -> None:
        self.model, self.ids = model, ids
        self.mask = torch.ones_like(ids)

    def check(self, forced: Tokens | None) -> Answers:
        seconds = [self.step() for _ in range(2)]
        return Answers(self.ids.numpy(), self.output.float().numpy(), tuple(seconds))

    def begin(self) -> None:
        """Nothing is carried from step to step."""

    def step(self) -> float:
        with torch.no_grad():
            started = time.perf_counter()
            self.output = self.model(input_ids=self.ids, attention_mask=self.mask)[0]
            return time.perf_counter() - started

    def cost(self) -> Cost:
        batch, length = self.ids.shape
        return Cost(
            _weights_read(self.model),
            _flops(self.model, batch, length, length, head_rows=length),
            batch * length,
        )


def _logits(call: Any, ids: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
    """The last position's logits [rows, vocabulary]; the arguments are those of transformers' `generate`."""
    output = call(
        input_ids=ids,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        return_dict=True,
    )
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def _input_ids(model: Any, tokenizer: Any, request: WorkRequest) -> torch.Tensor:
    """Token ids [batch, length]: the given ones, a passage of prose for each row, or seeded random ones."""
    if request.tokens is not None:
        return torch.tensor(request.tokens).expand(request.batch, -1).contiguous()
    count = request.batch * request.length
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, model.config.vocab_size, (request.batch, request.length), generator=generator)
    passage = tokenizer(_PROSE, add_special_tokens=False)["input_ids"]
    repeated = passage * (count // len(passage) + 1)
    return torch.tensor(repeated[:count]).reshape(request.batch, request.length)


def _fresh_cache(model: Any, static: Any) -> Any:
    from transformers import DynamicCache

    if static is None:
        return DynamicCache(config=model.config)
    static.reset()
    return static


def _static_cache(model: Any, room: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=room)


def _weights_read(model: Any) -> float:
    """Bytes of the matrices that every step reads. A table that is only looked up in does not count."""
    head = model.get_output_embeddings()
    table = model.get_input_embeddings().weight
    tied = head is not None and head.weight is table
    matrices = [weight for weight in model.parameters() if weight.dim() > 1 and (tied or weight is not table)]
    return float(sum(weight.numel() * weight.element_size() for weight in matrices))


def _cache_bytes(model: Any, batch: int, keys: float) -> float:
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2.0 * float(config.num_hidden_layers * batch * keys * heads * size * model.dtype.itemsize)


def _flops(model: Any, batch: int, queries: int, keys: float, head_rows: int) -> float:
    """Operations of the linear layers and of attention; `head_rows` rows of each text go through the head."""
    head, config = model.get_output_embeddings(), model.config
    head_size = head.weight.numel() if head is not None else 0
    layers = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    body = sum(weight.numel() for weight in layers)
    attention = 2 * config.num_hidden_layers * config.hidden_size * queries * keys
    return 2.0 * float(batch * (body * queries + head_size * head_rows + attention))
