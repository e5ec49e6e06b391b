"""The models that the benchmarks run, each as a training or inference step with random weights and inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch


@dataclasses.dataclass
class Step:
    """One step of a program, `run(model)`; `model` is what gets compiled."""

    model: torch.nn.Module
    run: Callable[[Callable[..., torch.Tensor]], torch.Tensor]


class _Logits(torch.nn.Module):
    """A transformers model that returns one tensor."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids)[0]


def _bert(layers: int, width: int, heads: int) -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _Logits(BertModel(config, add_pooling_layer=False))


def make(name: str, train: bool, device: str) -> Step:
    """A step of one of `NAMES`; on CUDA in bfloat16."""
    torch.manual_seed(0)
    layers, width, heads, batch, length = _SIZES[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = _bert(layers, width, heads).to(device, dtype).train(train)
    ids = torch.randint(1000, (batch, length), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run(call: Callable[..., torch.Tensor]) -> torch.Tensor:
        if not train:
            with torch.no_grad():
                return call(ids)
        optimizer.zero_grad()
        loss = call(ids).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return Step(model, run)


_SIZES = {
    "bert-tiny": (2, 64, 4, 2, 32),
    "bert-4": (4, 256, 4, 4, 64),
    "bert-base": (12, 768, 12, 16, 128),
}
NAMES = tuple(_SIZES)
