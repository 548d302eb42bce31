"""The Triton kernels on a real GPU, each forced by name, against the reference on the same device."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import quantcore
from quantcore import settings
from quantcore.kernels import reference, verification
from quantcore.nn import QuantizedLinear, grouped

pytestmark = pytest.mark.gpu


def quark(weight: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"quant_method": "quark", "global_quant_config": {"weight": weight, "input_tensors": inputs}}


INT8 = {"dtype": "int8", "qscheme": "per_channel", "ch_axis": 0}
UINT2 = {"dtype": "uint2", "qscheme": "per_group", "group_size": 128, "symmetric": False}
TOKENS = {"ch_axis": 1, "is_dynamic": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4-double": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "hqq-4bit": {"quant_method": "hqq", "nbits": 4},
    "hqq-3bit-axis0": {"quant_method": "hqq", "nbits": 3, "axis": 0},
    "hqq-1bit": {"quant_method": "hqq", "nbits": 1, "group_size": 32},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "gptq-3bit": {"quant_method": "gptq", "bits": 3, "group_size": 128, "sym": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "auto-round": {"quant_method": "auto-round", "bits": 4, "group_size": 128},
    "fp8": {"quant_method": "fp8"},
    "mxfp8": {"quant_method": "mxfp8"},
    "fbgemm": {"quant_method": "fbgemm_fp8"},
    "w4a16": {"quant_method": "compressed-tensors", "scheme": "W4A16"},
    "w8a8": {"quant_method": "compressed-tensors", "scheme": "W8A8"},
    "fp8-dynamic": {"quant_method": "compressed-tensors", "scheme": "FP8_DYNAMIC"},
    "nvfp4": {"quant_method": "compressed-tensors", "scheme": "NVFP4"},
    "mxfp4": {"quant_method": "compressed-tensors", "scheme": "MXFP4"},
    "quark-int8": quark(INT8, {**INT8, **TOKENS}),
    "quark-fp8": quark({**INT8, "dtype": "fp8_e4m3"}, {**INT8, "dtype": "fp8_e4m3", **TOKENS}),
    "quark-int3": quark({**INT8, "dtype": "int3"}),
    "quark-uint2": quark(UINT2),
}
# Sums of 1024 products in another order; half precision then rounds to a neighbour.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Tensor cores keep about 14 bits of a sum of 8-bit floats: DeepSeek-V3 (arXiv:2412.19437), section 3.3.2.
SHORT_SUMS = 2e-3
MEASURED = ("nf4", "hqq-3bit-axis0", "awq", "w4a16")  # whose layouts of words differ


def tolerance(config: dict[str, Any], dtype: torch.dtype) -> float:
    """The largest relative error of a layer whose inputs have this dtype."""
    return max(TOLERANCE[dtype], SHORT_SUMS if config["quant_method"] in ("fp8", "mxfp8") else 0.0)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 130, 1100])
def test_forced_kernel_gives_the_references_output_and_gradient(
    config: dict[str, Any], rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear.from_linear(torch.nn.Linear(1024, 384, dtype=dtype), config).to("cuda")
    x = torch.randn(rows, 1024, dtype=dtype, device="cuda")
    results = {}
    for kernel in ("torch", "triton"):
        monkeypatch.setenv("QUANTCORE_KERNEL", kernel)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.float().square().sum().backward()
        results[kernel] = (y.detach(), leaf.grad)
    for found, expected in zip(results["triton"], results["torch"], strict=True):
        assert relative_error(found, expected) <= tolerance(config, dtype)


def test_kernels_pass_their_trial(config: dict[str, Any]) -> None:
    verification.forget()
    layer = QuantizedLinear.from_linear(torch.nn.Linear(1024, 384, dtype=torch.bfloat16), config).to("cuda")
    x = torch.randn(40, 1024, dtype=torch.bfloat16, device="cuda")
    expected = reference.linear(x, layer.operands, layer.bias, layer.format, 384)
    for rows in (1, 40):
        assert relative_error(layer(x[:rows]), expected[:rows]) <= TOLERANCE[torch.bfloat16]
    assert verification.failures() == 0


@pytest.mark.parametrize("config", [CONFIGS[name] for name in MEASURED], ids=MEASURED, indirect=True)
def test_measured_launches_give_the_same_output_and_are_kept(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from quantcore.kernels.triton import tuning

    monkeypatch.setenv("QUANTCORE_CACHE", str(tmp_path))
    monkeypatch.setenv("QUANTCORE_AUTOTUNE", "1")
    monkeypatch.setenv("QUANTCORE_KERNEL", "triton")
    candidates = tuning.candidates
    monkeypatch.setattr(tuning, "candidates", lambda shape: candidates(shape)[:4])  # each is compiled
    tuning._tuner.cache_clear()
    layer = QuantizedLinear.from_linear(torch.nn.Linear(1024, 384, dtype=torch.bfloat16), config).to("cuda")
    for rows in (1, 40):
        x = torch.randn(rows, 1024, dtype=torch.bfloat16, device="cuda")
        found = layer(x)
        with settings.forced_to("reference"):
            assert relative_error(found, layer(x)) <= TOLERANCE[torch.bfloat16]
    tuning._tuner.cache_clear()
    assert len(list(tmp_path.rglob("*.json"))) >= 2


@pytest.mark.parametrize("rows", [[3, 0, 200, 17], [0, 0, 1]], ids=str)
def test_experts_give_what_each_gives_alone(rows: list[int]) -> None:
    from quantcore.kernels.triton import launch
    from quantcore_bnb.bitsandbytes.decode import decoder_for

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    linears = [torch.nn.Linear(512, 96, bias=False, dtype=torch.float16) for _ in rows]
    layers = [QuantizedLinear.from_linear(linear, config).to("cuda") for linear in linears]
    operands = [list(each.format.operands(each.quantized_weight.tensors, (96, 512)).values()) for each in layers]
    x = torch.randn(sum(rows), 512, dtype=torch.float16, device="cuda")
    ends = torch.tensor([*accumulate(rows)], device="cuda")
    found = launch.grouped(x, ends, operands, decoder_for(layers[0].format), 96, torch.float32)
    with settings.forced_to("reference"):
        expected = torch.cat([layer(part) for layer, part in zip(layers, x.split(rows), strict=True)])
    assert relative_error(found, expected) <= TOLERANCE[torch.float16]


def test_mixture_multiplies_its_experts_at_once_and_gives_what_each_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 96}
    torch.manual_seed(0)
    made = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes)).eval().to(torch.float32)
    model = quantcore.quantize(made, CONFIGS["nf4"]).to("cuda")
    ids, launches = torch.arange(40, device="cuda").view(2, 20), []
    plain = grouped.ops.grouped_linear
    counted = lambda *arguments: (launches.append(1), plain(*arguments))[1]  # noqa: E731
    monkeypatch.setattr(grouped, "ops", SimpleNamespace(grouped_linear=counted))
    with torch.no_grad():
        found = model(ids).logits
        assert len(launches) == 2 * 3
        with settings.forced_to("reference"):
            assert relative_error(found, model(ids).logits) <= TOLERANCE[torch.float32]
    assert len(launches) == 2 * 3
