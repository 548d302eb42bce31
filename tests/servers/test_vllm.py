"""vLLM on a CPU serves what we write and scores a text as we do; what we say that it refuses, it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import quantcore

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from command import cli  # noqa: E402  # found there alone

MODEL = ROOT / "examples" / "stdlib-lm"
ROWS, TOKENS = 4, 64
HANG = 3600  # seconds that only a hang reaches
# The largest difference of mean log-likelihoods, in nats per token: inputs and outputs of layers are rounded to
# bfloat16 at other places, and codes of inputs with them.
CLOSE = 0.01

CALIBRATED = ("--calibration", MODEL / "calibration.txt", "--samples", "8", "--seqlen", "64")
GPTQ = ("--method", "gptq", "--group-size", "128", *CALIBRATED)
AWQ = ("--method", "awq", "--group-size", "128", *CALIBRATED)
AUTO_ROUND = ("--method", "auto-round", "--bits", "4", "--group-size", "128", "--iters", "2", *CALIBRATED)
TENSORS = ("--method", "compressed-tensors", "--scheme")
FP8 = ("--method", "fp8", "--weight-block-size")

SERVED: dict[str, tuple[Any, ...]] = {
    "gptq": (*GPTQ, "--bits", "4"),
    "gptq in the order of activations": (*GPTQ, "--bits", "4", "--group-size", "-1", "--desc-act"),
    "awq": (*AWQ, "--bits", "4"),
    "awq without zero points": (*AWQ, "--bits", "4", "--no-zero-point"),
    "auto-round": (*AUTO_ROUND, "--packing-format", "auto_round:auto_gptq"),
    "auto-round with zero points": (*AUTO_ROUND, "--no-sym", "--packing-format", "auto_round:awq"),
    "W4A16": (*TENSORS, "W4A16"),
    "W4A16_ASYM": (*TENSORS, "W4A16_ASYM"),
    "W8A8": (*TENSORS, "W8A8"),
    "FP8_DYNAMIC": (*TENSORS, "FP8_DYNAMIC"),
    "FP8_BLOCK": (*TENSORS, "FP8_BLOCK"),
    "fp8 in blocks": (*FP8, "128,128"),
}
NEED_AMX = ("FP8_BLOCK", "fp8 in blocks")
# Layouts that it reads and has kernels for on GPUs alone, with what it says of them on a CPU.
ON_GPUS: dict[str, tuple[tuple[Any, ...], str]] = {
    "gptq of 8 bits": ((*GPTQ, "--bits", "8"), "does not support weight_bits = uint8b128"),
    "W8A16": ((*TENSORS, "W8A16"), "Failed to find a kernel that can implement the WNA16 linear layer"),
    "fp8 per tensor": ((*FP8, "none"), "static_scaled_fp8_quant"),
}
# Settings that it does not take on any machine.
REFUSED: dict[str, tuple[Any, ...]] = {
    "gptq asymmetric": (*GPTQ, "--bits", "4", "--no-sym"),
    "gptq of 3 bits": (*GPTQ, "--bits", "3"),
    "gptq in the order of activations": (*GPTQ, "--bits", "4", "--desc-act"),
    "awq of 8 bits": (*AWQ, "--bits", "8"),
    "awq gemv": (*AWQ, "--bits", "4", "--version", "gemv"),
    "auto-round with zero points": (*AUTO_ROUND, "--no-sym", "--packing-format", "auto_round:auto_gptq"),
    "auto-round of 3 bits": (*AUTO_ROUND, "--bits", "3", "--packing-format", "auto_round:auto_gptq"),
}


def rows() -> list[list[int]]:
    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode((MODEL / "eval.txt").read_text()).ids
    return [ids[start : start + TOKENS] for start in range(0, ROWS * TOKENS, TOKENS)]


def ask_vllm(folder: Path, names: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What vLLM makes of each folder; files of ours in folder."""
    ids, out = folder / "ids.json", folder / "answers.jsonl"
    ids.write_text(json.dumps(rows()))
    script = Path(__file__).with_name("vllm_scores.py")
    done = subprocess.run(
        [sys.executable, script, ids, out, *names.values()], capture_output=True, text=True, timeout=HANG, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    return dict(zip(names, answers, strict=True))


def quantized(folder: Path, layouts: dict[str, tuple[Any, ...]], *flags: str) -> dict[str, Path]:
    """A folder for each layout."""
    made = {name: folder / name.replace(" ", "-") for name in layouts}
    for name, settings in layouts.items():
        found = cli("quantize", MODEL, made[name], *settings, *flags)
        assert found.code == 0, f"{name}: {found.err}"
    return made


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = quantized(tmp_path_factory.mktemp("served"), SERVED, "--serve-with", "vllm")
    return {"float": MODEL, **made}


@pytest.fixture(scope="module")
def answers(served: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return ask_vllm(tmp_path_factory.mktemp("answers"), served)


@pytest.fixture(scope="module")
def answers_for_gpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder, layouts = tmp_path_factory.mktemp("gpus"), {name: flags for name, (flags, _) in ON_GPUS.items()}
    return ask_vllm(folder, quantized(folder, layouts, "--serve-with", "vllm"))


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("refused")
    return ask_vllm(folder, quantized(folder, REFUSED))


def our_mean(folder: Path) -> float:
    """The mean log-likelihood of the text's tokens by our model in a folder."""
    ids = torch.tensor(rows())
    with torch.no_grad():
        logits = quantcore.load(folder)(ids).logits.float()
    likelihoods = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    return float(likelihoods.mean())


@pytest.mark.parametrize("name", ["float", *SERVED])
def test_it_scores_a_text_as_we_do(name: str, served: dict[str, Path], answers: dict[str, dict[str, Any]]) -> None:
    answer = answers[name]
    if name in NEED_AMX and not torch.cpu._is_amx_tile_supported():
        assert "requires AMX tile support" in answer["error"]
        return
    assert "error" not in answer, answer["error"]
    found = float(torch.tensor(answer["scores"]).mean())
    assert found == pytest.approx(our_mean(served[name]), abs=CLOSE)


@pytest.mark.parametrize("name", ON_GPUS)
def test_what_it_computes_on_gpus_alone_ends_in_its_kernels(
    name: str, answers_for_gpus: dict[str, dict[str, Any]]
) -> None:
    assert ON_GPUS[name][1] in answers_for_gpus[name].get("error", "it serves this on a CPU now: move it to SERVED")


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_refuse_for_it_it_refuses(name: str, refusals: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    ours = cli("quantize", MODEL, tmp_path / "out", *REFUSED[name], "--serve-with", "vllm", "--dry-run")
    assert ours.code == 2
    assert "vllm does not take" in ours.err
    assert "error" in refusals[name], "vLLM serves it: drop the refusal of Guide.refused"
