"""Small models for the tests of calibration: one of each way in which a model may hand data to its blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, TOKENS = 12, 30


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        return self.o_proj(torch.sigmoid(self.q_proj(x) + angles) * self.v_proj(x))


class Layer(nn.Module):
    """A block with keyword arguments that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.up = nn.LayerNorm(WIDTH), Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, *, angles: Tensor) -> tuple[Tensor, None]:
        hidden = hidden + self.attention(self.norm(hidden), angles=angles)
        return hidden + torch.relu(self.up(hidden)), None


class Language(nn.Module):
    """Ids to logits, with another table for each block, an adapter before the blocks and a head after them."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.adapter = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([Layer() for _ in range(depth)])
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.adapter(self.embed(input_ids))
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, angles=torch.full((1, input_ids.shape[1], 1), float(number)))[0]
        return self.head(hidden)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


class Plain(nn.Module):
    """A block of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.up(hidden))


class Stack(nn.Module):
    """Ids to hidden states; subclasses say how the blocks are run."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList([Plain() for _ in range(depth)])

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(self.embed(input_ids))

    def run(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError


class Scaled(Stack):
    """Between blocks the hidden states are scaled: more than a hand-over, less than a hindrance."""

    def run(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden) * 0.5
        return hidden


class Backwards(Stack):
    """Blocks run from the last to the first."""

    def run(self, hidden: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            hidden = layer(hidden)
        return hidden


class Skipping(Stack):
    """The last block also reads what the first gave."""

    def run(self, hidden: Tensor) -> Tensor:
        first = self.layers[0](hidden)
        return self.layers[2](self.layers[1](first) + first)


class Repeating(Stack):
    """Every block runs twice."""

    def run(self, hidden: Tensor) -> Tensor:
        for layer in [*self.layers, *self.layers]:
            hidden = layer(hidden)
        return hidden


class InPlace(Stack):
    """What a block gave is changed where it lies."""

    def run(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
            hidden += 1
        return hidden


class Crossed(nn.Module):
    """A block of a decoder: it reads the encoder's output too."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, encoded: Tensor) -> Tensor:
        return hidden + torch.tanh(self.own(hidden)) + self.other(encoded).mean(1, keepdim=True)


class Translation(nn.Module):
    """An encoder and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.decoder = nn.ModuleList([Crossed() for _ in range(2)])
        self.encoder = nn.ModuleList([Plain() for _ in range(2)])

    def forward(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        encoded = self.embed(input_ids)
        for layer in self.encoder:
            encoded = layer(encoded)
        hidden = self.embed(target_ids)
        for layer in self.decoder:
            hidden = layer(hidden, encoded)
        return hidden


class Experts(nn.Module):
    """A block with a router: the token's first channel chooses between the first two of three experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Plain() for _ in range(3)])

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            chosen = (hidden[..., 0] > 0).long() == number
            if bool(chosen.any()):
                mixed[chosen] = expert(hidden[chosen])
        return hidden + mixed


class Mixture(nn.Module):
    """A stack of blocks with experts."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList([Experts() for _ in range(depth)])

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def make(cls: type[nn.Module]) -> nn.Module:
    """The model with values that are the same at every call, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls().eval()


def token_ids(rows: int = 5, length: int = 7) -> Tensor:
    """Rows of ids that differ from each other."""
    return torch.arange(rows * length).view(rows, length).mul(7).remainder(TOKENS)
