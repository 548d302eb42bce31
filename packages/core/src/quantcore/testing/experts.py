"""Small mixtures of experts, in the forms that published models have."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from quantcore.testing.subjects import normal

EXPERTS = 3
CHOSEN = 2  # experts a token
HIDDEN = 256
INNER = 512
TOKENS = 40


class FusedExperts(nn.Module):
    """Gated experts with one weight for all: gate_up_proj [E, 2 I, H], the gate's rows first; down_proj [E, H, I]."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, 2 * INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, INNER))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """x [T, H], chosen and shares [T, CHOSEN]: the sum of what the chosen experts give, each by its share."""
        out = torch.zeros_like(x)
        for expert in chosen.unique():
            token, place = torch.where(chosen == expert)
            y = self.run_expert(x[token], expert)
            out.index_add_(0, token, y * shares[token, place, None])
        return out

    def run_expert(self, x: Tensor, expert: Tensor) -> Tensor:
        """What one expert gives for x [T, H]."""
        gate, up = linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return linear(self.act_fn(gate) * up, self.down_proj[expert])


class TransposedExperts(FusedExperts):
    """Weights [E, H, 2 I] and [E, I, H] with biases; columns of gate and up take turns."""

    is_concatenated = False

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, 2 * INNER))
        self.gate_up_proj_bias = nn.Parameter(torch.empty(EXPERTS, 2 * INNER))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, INNER, HIDDEN))
        self.down_proj_bias = nn.Parameter(torch.empty(EXPERTS, HIDDEN))

    def run_expert(self, x: Tensor, expert: Tensor) -> Tensor:
        both = x @ self.gate_up_proj[expert] + self.gate_up_proj_bias[expert]
        return (silu(both[..., ::2]) * both[..., 1::2]) @ self.down_proj[expert] + self.down_proj_bias[expert]


class DenseExperts(FusedExperts):
    """Every expert runs on every token, by batched products with weights [E, H, 2 I] and [E, I, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, 2 * INNER))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, INNER, HIDDEN))

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        every = x.expand(self.gate_up_proj.shape[0], -1, -1)
        gate, up = torch.bmm(every, self.gate_up_proj).chunk(2, dim=-1)
        y = torch.bmm(self.act_fn(gate) * up, self.down_proj)  # [E, T, H]
        weights = torch.zeros(len(x), self.num_experts, dtype=x.dtype).scatter(1, chosen, shares)
        return torch.einsum("eth,te->th", y, weights)


class Mixture(nn.Module):
    """A router and the experts that it chooses from."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(EXPERTS, HIDDEN))
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        shares, chosen = linear(x, self.gate).softmax(-1).topk(CHOSEN, dim=-1)
        y: Tensor = self.experts(x, chosen, shares)
        return y


class Body(nn.Module):
    """Embedding and mixture, with a residual connection."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(TOKENS, HIDDEN)
        self.mlp = Mixture(experts)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed_tokens(ids)
        return x + self.mlp(x)  # type: ignore[no-any-return]


class SmallMixtureModel(nn.Module):
    """Token ids [T] to logits [T, TOKENS]; "model.mlp.experts" holds the experts."""

    def __init__(self, experts: type[nn.Module] = FusedExperts, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = Body(experts())
        self.lm_head = nn.Linear(HIDDEN, TOKENS, bias=False)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(0.1 * normal(tuple(parameter.shape), seed=seed))
        self.to(dtype).eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model(ids))  # type: ignore[no-any-return]
