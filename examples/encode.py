"""Encode a padded batch of texts with a BERT compiled by graphopt, and compare with eager."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import BertConfig, BertModel


def main() -> None:
    """Two texts of different lengths, padded to one; mean of the token vectors, as sentence encoders do."""
    config = BertConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = BertModel(config).eval()
    ids = torch.randint(5, 512, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0

    def encode(network: Callable[..., Any]) -> torch.Tensor:
        hidden: torch.Tensor = network(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        return torch.div((hidden * weights).sum(dim=1), weights.sum(dim=1))

    with torch.inference_mode():
        expected = encode(model)
        answer = encode(torch.compile(model, backend="graphopt"))
    print("vectors:", tuple(answer.shape))
    print("largest difference from eager:", float((answer - expected).abs().max()))


if __name__ == "__main__":
    main()
