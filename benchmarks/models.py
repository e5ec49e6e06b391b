"""The models of the benchmarks, as training or inference steps with random weights and inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn


@dataclasses.dataclass
class Step:
    """One step of a program: `run(model)`, where `model` may be compiled."""

    model: nn.Module
    run: Callable[[Callable[..., Tensor]], Tensor]


class _FirstOutput(nn.Module):
    """A transformers model that returns one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)[0]


def _bert(layers: int, width: int, heads: int, batch: int, length: int) -> tuple[nn.Module, Tensor]:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _FirstOutput(BertModel(config, add_pooling_layer=False)), _ids(batch, length)


def _gpt2() -> tuple[nn.Module, Tensor]:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return _FirstOutput(GPT2Model(config)), _ids(2, 32)


def _vit() -> tuple[nn.Module, Tensor]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=32,
        patch_size=8,
    )
    return _FirstOutput(ViTModel(config, add_pooling_layer=False)), torch.rand(2, 3, 32, 32)


class _Lstm(nn.Module):
    """An LSTM cell over time, written out, since Dynamo does not capture `nn.LSTM`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_input, self.of_state = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)

    def forward(self, sequence: Tensor) -> Tensor:
        h = c = torch.zeros_like(sequence[0])
        outputs = []
        for x in self.of_input(sequence):
            i, f, g, o = (x + self.of_state(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs)


class _ResidualBlock(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.first_norm, self.second_norm = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first_norm(self.first(x)).relu()
        return (x + self.second_norm(self.second(y))).relu()


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(1000, (batch, length))


_BUILDERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "bert-tiny": functools.partial(_bert, 2, 64, 4, 2, 32),
    "bert-4": functools.partial(_bert, 4, 256, 4, 4, 64),
    "bert-base": functools.partial(_bert, 12, 768, 12, 16, 128),
    "gpt2-tiny": _gpt2,
    "vit-tiny": _vit,
    "lstm-tiny": lambda: (_Lstm(64), torch.rand(8, 4, 64)),
    "resnet-block": lambda: (_ResidualBlock(32), torch.rand(4, 32, 14, 14)),
}
"""Functions that return a model and an input for it, by name."""

NAMES = tuple(_BUILDERS)


def make(name: str, train: bool, device: str) -> Step:
    """A step of the model `name`, one of `NAMES`; in bfloat16 on CUDA, else in float32."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, inputs = _BUILDERS[name]()
    model = model.to(device, dtype).train(train)
    inputs = inputs.to(device, dtype if inputs.is_floating_point() else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run(call: Callable[..., Tensor]) -> Tensor:
        if not train:
            with torch.no_grad():
                return call(inputs)
        optimizer.zero_grad()
        loss = call(inputs).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return Step(model, run)
