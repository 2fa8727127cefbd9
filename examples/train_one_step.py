"""Train through graphopt: forward and backward graphs are both optimised, and the losses are eager's."""

import copy
from collections.abc import Callable

import torch
from torch import nn


def losses(model: Callable[..., torch.Tensor], parameters: list[nn.Parameter]) -> list[float]:
    """The loss before each of three optimizer steps on a fixed batch."""
    generator = torch.Generator().manual_seed(1)
    inputs, targets = (
        torch.randn(16, 32, generator=generator),
        torch.randint(0, 4, (16,), generator=generator),
    )
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    seen = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    return seen


def main() -> None:
    """The same model trained twice, eagerly and compiled; the compiled code sees the optimizer's updates."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 4))
    twin = copy.deepcopy(model)
    eager = losses(model, list(model.parameters()))
    compiled = losses(torch.compile(twin, backend="graphopt"), list(twin.parameters()))
    print("eager:   ", [f"{loss:.6f}" for loss in eager])
    print("graphopt:", [f"{loss:.6f}" for loss in compiled])
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(eager))


if __name__ == "__main__":
    main()
