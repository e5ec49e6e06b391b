"""Real models with random weights, in inference and training, before, during and after the swap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Subject, Wrap, through_swap, why_no_packages
from torch import Tensor, nn

import frame_swap

pytestmark = pytest.mark.usefixtures("unpadded")

DEEP = {"rtol": 1e-4, "atol": 1e-5}
"""Rounding adds up over layers, and sums over a batch come in another order."""

Build = Callable[[], tuple[nn.Module, Callable[[], dict[str, Tensor]]]]
"""Makes a model and what makes its keyword arguments."""


def bert() -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    config = transformers().BertConfig(
        **TEXT, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return transformers().BertForMaskedLM(config), tokens


def gpt2() -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    config = transformers().GPT2Config(
        **TEXT,
        n_embd=32,
        n_layer=2,
        n_head=2,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers().GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # transformers guesses so, too, and logs it, which breaks the graph
    return model, tokens


def vit() -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    config = transformers().ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=3,
        problem_type="single_label_classification",  # else the first loss sets it: a recompile
    )
    model = transformers().ViTForImageClassification(config)
    return model, lambda: {"pixel_values": torch.rand(2, 3, 16, 16), "labels": torch.tensor([0, 2])}


def our_own() -> tuple[nn.Module, Callable[[], dict[str, Tensor]]]:
    return Transformer(vocabulary=64, width=32, heads=2, layers=2), tokens


TEXT = {"vocab_size": 64, "max_position_embeddings": 16}


def transformers() -> Any:
    return pytest.importorskip("transformers", reason='needs transformers: pip install -e ".[models]"')


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(64, (2, 8))
    return {"input_ids": ids, "labels": ids}


class Layer(nn.Module):
    """Causal attention and a feed-forward net, each with a norm before it and a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.feed(self.feed_norm(x))


class Transformer(nn.Module):
    """A language model with tied input and output embeddings."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(16, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = self.norm(x) @ self.tokens.weight.t()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


thorough = pytest.mark.thorough


@pytest.mark.parametrize(
    "build",
    [bert, pytest.param(gpt2, marks=thorough), pytest.param(vit, marks=thorough), our_own],
    ids=lambda build: build.__name__,
)
def test_model_through_the_swap(build: Build, device: str) -> None:
    def trained_and_asked(compiled: Wrap) -> Subject:
        model, inputs = build()
        model.eval()  # dropout would draw other numbers in compiled code
        function = compiled(model)

        def call(arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                logits = function(**arguments)["logits"]
            return logits, function(**arguments)["loss"]

        return Subject(call, [lambda: (inputs(),)], model, DEEP)

    assert len(through_swap(trained_and_asked, device=device)) == 2


@pytest.mark.long
@pytest.mark.parametrize("build", [bert, gpt2, vit, our_own], ids=lambda build: build.__name__)
def test_model_as_a_package(build: Build) -> None:
    if reason := why_no_packages():
        pytest.skip(reason)
    frame_swap.configure(artifact="aoti")

    def inference(compiled: Wrap) -> Subject:
        model, inputs = build()
        call = compiled(model.eval())
        return Subject(lambda inputs: call(**inputs), [lambda: (inputs(),)], model, DEEP)

    with torch.no_grad():
        (record,) = through_swap(inference, device="cpu")
    assert [(one.artifact, one.artifact_reason) for one in record.attempts] == [("aoti", "")]
