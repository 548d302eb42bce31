"""`quantcore quantize --serve-with`: names that a program reads, and no settings that it does not take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import cli
from safetensors.torch import load_file

import quantcore
from quantcore.plugins.manager import plugins
from quantcore.plugins.serving import refusals

METHODS = [info.method for info in quantcore.methods() if info.installed]
PER_TENSOR = ("--method", "fp8", "--weight-block-size", "none")


@pytest.fixture
def folder(make_model: Callable[[str], Any], tmp_path: Path) -> Path:
    """A small float model."""
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.mark.parametrize("method", METHODS)
def test_refusals_name_settings_of_the_config(method: str) -> None:
    guide = plugins().backend(method).guide
    cls = plugins().resolve(method, "config")
    known = {*cls.__dataclass_fields__, *cls.other_keys}
    named = [name.partition(".")[0] for refusal in guide.refused for name in (*refusal.settings, *refusal.unless)]
    assert set(named) <= known


@pytest.mark.parametrize("method", METHODS)
def test_no_server_refuses_the_default_of_a_method_that_it_reads(method: str) -> None:
    backend = plugins().backend(method)
    config = plugins().resolve(method, "config").from_dict({**backend.example_configs[0], "quant_method": method})
    assert not [
        refusal for server in backend.guide.served_by for refusal in refusals(backend.guide, config.to_dict(), server)
    ]


@pytest.mark.parametrize(
    ("flags", "server", "names"),
    [
        (("--method", "gptq", "--bits", "4", "--no-sym"), "vllm", ("sym=False", "sym=True")),
        (("--method", "gptq", "--bits", "3"), "sglang", ("bits=3", "bits=4")),
        (("--method", "gptq", "--bits", "4", "--desc-act"), "vllm", ("desc_act=True", "desc_act=False")),
        (("--method", "awq", "--bits", "4", "--version", "gemv"), "vllm", ("version=gemv", "version=gemm")),
        (("--method", "quanto"), "vllm", ("quanto", "compressed-tensors")),
        (("--method", "hqq", "--nbits", "4"), "llama.cpp", ("hqq", "gguf")),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_with_what_can(
    flags: tuple[str, ...], server: str, names: tuple[str, str], folder: Path, tmp_path: Path
) -> None:
    found = cli("quantize", folder, tmp_path / "out", *flags, "--serve-with", server)
    assert found.code == 2
    assert "--serve-with" in found.err
    assert all(name in found.err for name in names)
    assert not (tmp_path / "out").exists()


def test_desc_act_without_groups_is_served(folder: Path) -> None:
    flags = ("--method", "gptq", "--bits", "4", "--desc-act", "--group-size", "-1")
    assert cli("quantize", folder, *flags, "--serve-with", "vllm", "--dry-run").code == 0


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_fp8_per_tensor_has_the_names_that_servers_read(server: str, folder: Path, tmp_path: Path) -> None:
    assert cli("quantize", folder, tmp_path / "usual", *PER_TENSOR).code == 0
    assert cli("quantize", folder, tmp_path / "served", *PER_TENSOR, "--serve-with", server).code == 0
    usual, served = (load_file(tmp_path / name / "model.safetensors") for name in ("usual", "served"))
    assert served.keys() == {name.replace("weight_scale_inv", "weight_scale") for name in usual}
    assert all(served[f"{name}_scale"].shape == () for name in served if f"{name}_scale" in served)
    described = json.loads((tmp_path / "served/config.json").read_text())["quantization_config"]
    assert described["ignored_layers"] is None
    assert described["activation_scheme"] == "dynamic"
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        found, expected = (quantcore.load(tmp_path / name)(ids).logits for name in ("served", "usual"))
    assert torch.equal(found, expected)


def test_fp8_per_tensor_stays_as_transformers_reads_it(folder: Path, tmp_path: Path) -> None:
    assert cli("quantize", folder, tmp_path / "out", *PER_TENSOR, "--serve-with", "transformers").code == 0
    assert any(name.endswith("weight_scale_inv") for name in load_file(tmp_path / "out/model.safetensors"))
    assert "ignored_layers" not in json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]


def test_layers_that_stay_float_are_listed_for_servers(folder: Path, tmp_path: Path) -> None:
    skips = ("--modules-to-not-convert", "lm_head,model.layers.0.mlp.down_proj")
    assert cli("quantize", folder, tmp_path / "out", *PER_TENSOR, *skips, "--serve-with", "vllm").code == 0
    described = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert described["ignored_layers"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    assert "model.layers.0.mlp.down_proj.weight_scale" not in load_file(tmp_path / "out/model.safetensors")


def test_llama_cpp_reads_files_of_its_own(folder: Path, tmp_path: Path) -> None:
    found = cli("quantize", folder, tmp_path / "out", "--method", "gguf", "--serve-with", "llama.cpp")
    assert found.code == 2
    assert "out.gguf" in found.err


def test_label_of_auto_round_is_the_one_that_servers_accept(folder: Path) -> None:
    flags = (
        "--method",
        "auto-round",
        "--bits",
        "4",
        "--group-size",
        "32",
        "--no-sym",
        "--packing-format",
        "auto_round:awq",
    )
    found = cli("quantize", folder, *flags, "--serve-with", "vllm", "--dry-run")
    assert found.code == 0, found.err
