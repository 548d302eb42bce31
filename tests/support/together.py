"""What `test_several_processes.py` runs in each process that torchrun starts: `together.py JOB FOLDER ...`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantcore
from quantcore_gptq.gptq import pieces

WIDTH, TOKENS, DEPTH = 32, 40, 2
pieces._ROWS = 24  # so that rows of the smallest model are shared out too

CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "auto-round": {"quant_method": "auto-round", "bits": 4, "group_size": 32, "iters": 2},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "solver": "gptq",
        "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
    },
    "hqq": {"quant_method": "hqq", "nbits": 4, "group_size": 32},
}
DATA = {"calibration": torch.arange(5 * 2 * 12).view(10, 12).mul(7).remainder(TOKENS), "batch_size": 2}
NO_DATA = ("hqq",)
BOUNDED = ("gptq", "compressed-tensors")  # whose layers take turns


class Expert(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, WIDTH))


class Layer(nn.Module):
    """A block with attention's shape of layers, and two experts of which each token reaches one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q_proj, self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.o_proj = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, WIDTH)) for _ in range(3)]
        )

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden)
        hidden = hidden + self.o_proj(torch.sigmoid(self.q_proj(x)) * self.v_proj(x))
        choice = (hidden.sum(-1) * 10).long() % len(self.experts)
        added = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            added[choice == number] = expert(hidden[choice == number])
        return hidden + added


class Model(nn.Module):
    """Ids to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList([Layer() for _ in range(DEPTH)])
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def make() -> Model:
    torch.manual_seed(0)
    model = Model()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def save_float(folder: Path) -> Path:
    quantcore.save(make(), folder)
    (folder / "config.json").write_text('{"architectures": ["Model"]}')
    return folder


def data_of(method: str) -> dict[str, Any]:
    return {} if method in NO_DATA else DATA


def in_memory(method: str, target: Path) -> None:
    model = quantcore.quantize(make(), dict(CONFIGS[method]), **data_of(method))
    quantcore.save(model, target)


def to_file(method: str, source: Path, target: Path, **settings: Any) -> None:
    quantcore.quantize_checkpoint(source, target, dict(CONFIGS[method]), model=Model, **data_of(method), **settings)


def finish_all(folder: Path) -> None:
    """Every method in memory, from file to file, within a bound, and from where one process stopped."""
    for method in CONFIGS:
        if method not in NO_DATA:
            in_memory(method, folder / f"memory-{method}")
        to_file(method, folder / "float", folder / f"files-{method}")
    for method in ("gptq", "awq", "auto-round"):
        to_file(method, folder / "float", folder / f"stopped-{method}")
    for method in BOUNDED:
        to_file(method, folder / "float", folder / f"bounded-{method}", max_memory="150KB")


def die(folder: Path) -> None:
    """Process 1 is killed in the middle of the second block; process 0 says what it sees."""
    rank = int(os.environ["RANK"])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which torchrun ends it too, before it has said anything

    def progress(state: Any) -> None:
        if rank == 1 and state.block == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        to_file("gptq", folder / "float", folder / "died", progress=progress)
    except quantcore.errors.ProcessGroupError as error:
        (folder / f"told-{rank}").write_text(str(error))
        raise SystemExit(1) from error


def fail(folder: Path) -> None:
    """The solver of process 1 alone raises."""
    rank = int(os.environ["RANK"])
    if rank == 1:
        pieces.solve = _raise
    try:
        in_memory("gptq", folder / "failed")
    except (ValueError, quantcore.errors.ProcessGroupError) as error:
        (folder / f"told-{rank}").write_text(f"{type(error).__name__}: {error}")


def _raise(*args: Any) -> Any:
    raise ValueError("no room for the solution")


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
