"""The small model that the conformance suite quantizes, saves and loads."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from quantcore.testing.subjects import Example, normal

HIDDEN = 128
TOKENS = 40
USUAL_INNER = 256
ODD_INNER = (200, 136, 160, 192)  # K that no usual group size divides, and then some that fewer formats refuse


class Attention(nn.Module):
    """One projection, under the name that published models give it."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two projections, the first with a bias."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(HIDDEN, inner)
        self.down_proj = nn.Linear(inner, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gelu(self.up_proj(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Norms, attention and MLP with residual connections."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(HIDDEN)
        self.self_attn = Attention()
        self.mlp = Mlp(inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(x)  # type: ignore[no-any-return]


class Body(nn.Module):
    """Embedding, one block, norm, and a buffer that checkpoints hold."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(TOKENS, HIDDEN)
        self.layers = nn.ModuleList([Block(inner)])
        self.norm = nn.LayerNorm(HIDDEN)
        self.register_buffer("offset", torch.linspace(-1, 1, HIDDEN))

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed_tokens(ids) + self.get_buffer("offset")
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)  # type: ignore[no-any-return]


class SmallModel(nn.Module):
    """Token ids [..., T] to logits [..., T, TOKENS]; the head's weight is the embedding's."""

    def __init__(self, inner: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = Body(inner)
        self.lm_head = nn.Linear(HIDDEN, TOKENS, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model(ids))  # type: ignore[no-any-return]


def model_factory(example: Example, dtype: torch.dtype = torch.float32) -> Callable[[], SmallModel]:
    """A function that builds the model in a size that the example's format can store, an odd one where it can."""
    inner = _inner(example, dtype)
    return lambda: SmallModel(inner, dtype)


def quantized_model(example: Example, dtype: torch.dtype = torch.float32) -> SmallModel:
    """The model, quantized with the example config: a copy of one that is made once."""
    return copy.deepcopy(_quantized_once(example, dtype))


def quantize_anew(example: Example, dtype: torch.dtype = torch.float32) -> SmallModel:
    """The model, quantized with the example config, whatever was made before."""
    model = example.quantize_model(filled(model_factory(example, dtype)()))
    assert isinstance(model, SmallModel)
    return model


_quantized_once = functools.lru_cache(maxsize=256)(quantize_anew)  # 0.2 MB each


def filled(model: SmallModel) -> SmallModel:
    """The model in eval mode with values that are the same in every process."""
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(0.1 * normal(tuple(parameter.shape), seed=seed))
    return model.eval()


def token_ids() -> Tensor:
    """Two rows of ids, among them the first and the last token."""
    return torch.arange(2 * TOKENS).view(2, -1) % TOKENS


@functools.cache
def _inner(example: Example, dtype: torch.dtype) -> int:
    return next((size for size in ODD_INNER if _fits(example, size, dtype)), USUAL_INNER)


def _fits(example: Example, inner: int, dtype: torch.dtype) -> bool:
    for shape in ((inner, HIDDEN), (HIDDEN, inner)):
        linear = nn.Linear(shape[1], shape[0], dtype=dtype, device="meta")
        try:
            example.weight_format(linear).check_shape(shape)
        except ValueError:
            return False
    return True
