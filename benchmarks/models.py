"""The models of the benchmarks, as training or inference steps with random weights and inputs.

The small ones have steps of milliseconds: what is measured is overhead. bert-4 has short steps, and compiling it
hardly pays on a CPU. ViT-B, Mixer-B, ResNet-50 and Whisper's encoder have long steps (0.3 to 2 s on two cores), and
compiling them pays. FCOS and Mask R-CNN break into many graphs, and are traced anew for other numbers of boxes.
bert-base, vit-b-32, mixer-b-32, gpt2 and lennard-jones are for a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass
class Step:
    """One step of a program: `run(model)`, where `model` may be compiled."""

    model: nn.Module
    run: Callable[[Callable[..., Any]], object]


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


def _gpt2(layers: int, width: int, heads: int, batch: int, length: int) -> tuple[nn.Module, Tensor]:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_positions=2 * length,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return _FirstOutput(GPT2Model(config)), _ids(batch, length)


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


def _timm(name: str, batch: int = 2) -> tuple[nn.Module, Tensor]:
    import timm

    return timm.create_model(name), torch.rand(batch, 3, 224, 224)


class _LennardJones(nn.Module):
    """Predicts the energy of pairs of atoms from their distance, and the force as the energy's derivative.

    The program is functorch's example of the Lennard-Jones potential: the Jacobian is part of the forward.
    """

    def __init__(self, width: int = 16, layers: int = 5) -> None:
        super().__init__()
        widths = [1, *[width] * layers]
        hidden = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
        self.energy = nn.Sequential(*hidden, nn.Linear(width, 1))

    def forward(self, vectors: Tensor) -> Tensor:
        distances = vectors.norm(dim=1, keepdim=True)
        energies = torch.func.vmap(self.energy)(distances)
        slopes = torch.func.vmap(torch.func.jacrev(self.energy))(distances).squeeze(-1)
        return torch.cat([energies, -slopes * vectors / distances], dim=1)


def _whisper_encoder() -> tuple[nn.Module, Tensor]:
    """The encoder of whisper-base, for ten seconds of sound."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=512,
        encoder_layers=6,
        encoder_attention_heads=8,
        encoder_ffn_dim=2048,
        max_source_positions=500,
    )
    return _FirstOutput(WhisperEncoder(config)), torch.rand(2, 80, 1000)


def _detector(name: str) -> tuple[nn.Module, list[Tensor], list[dict[str, Tensor]]]:
    """A detection model of torchvision, an image, and what is to be found in it."""
    from torchvision.models import detection

    model = getattr(detection, name)(weights=None, weights_backbone=None, min_size=160, max_size=160)
    target = {
        "boxes": torch.tensor([[10.0, 20.0, 90.0, 120.0], [30.0, 40.0, 150.0, 140.0]]),
        "labels": torch.tensor([1, 2]),
        "masks": torch.ones(2, 160, 160, dtype=torch.uint8),
    }
    return model, [torch.rand(3, 160, 160)], [target]


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(1000, (batch, length))


_BUILDERS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "bert-tiny": functools.partial(_bert, 2, 64, 4, 2, 32),
    "bert-4": functools.partial(_bert, 4, 256, 4, 4, 64),
    "bert-base": functools.partial(_bert, 12, 768, 12, 16, 128),
    "gpt2-tiny": functools.partial(_gpt2, 2, 64, 4, 2, 32),
    "gpt2": functools.partial(_gpt2, 12, 768, 12, 8, 256),
    "vit-tiny": _vit,
    "lstm-tiny": lambda: (_Lstm(64), torch.rand(8, 4, 64)),
    "resnet-block": lambda: (_ResidualBlock(32), torch.rand(4, 32, 14, 14)),
    "vit-b": functools.partial(_timm, "vit_base_patch16_224"),
    "vit-b-32": functools.partial(_timm, "vit_base_patch16_224", 32),
    "mixer-b": functools.partial(_timm, "mixer_b16_224"),
    "mixer-b-32": functools.partial(_timm, "mixer_b16_224", 32),
    "resnet-50": functools.partial(_timm, "resnet50"),
    "whisper-encoder": _whisper_encoder,
    "lennard-jones": lambda: (_LennardJones(), torch.rand(1000, 3) + 0.5),
    "fcos": functools.partial(_detector, "fcos_resnet50_fpn"),
    "mask-rcnn": functools.partial(_detector, "maskrcnn_resnet50_fpn"),
}
"""Functions that return a model and its inputs, by name."""

NAMES = tuple(_BUILDERS)


def make(name: str, train: bool, device: str) -> Step:
    """A step of the model `name`, one of `NAMES`; in bfloat16 on CUDA, else in float32."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, *inputs = _BUILDERS[name]()
    model = model.to(device, dtype).train(train)
    args = _moved(inputs, device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run(call: Callable[..., Any]) -> object:
        if not train:
            with torch.no_grad():
                return call(*args)
        optimizer.zero_grad()
        loss = _loss(call(*args))
        loss.backward()
        optimizer.step()
        return loss

    return Step(model, run)


def _loss(output: Any) -> Tensor:
    """The sum of a detector's losses; for another model's output, the mean of its squares."""
    if isinstance(output, dict):
        return torch.stack(list(output.values())).sum()
    return output.float().square().mean()


def _moved(inputs: Any, device: str, dtype: torch.dtype) -> Any:
    """Inputs on the device; those of floating point get the type, too."""
    if isinstance(inputs, list):
        return [_moved(each, device, dtype) for each in inputs]
    if isinstance(inputs, dict):
        return {name: _moved(each, device, dtype) for name, each in inputs.items()}
    return inputs.to(device, dtype if inputs.is_floating_point() else None)
