"""Models that torchao until 0.13 stored as pickled objects, rewritten by `quantcore convert --from-pickle`."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quantcore as qc
from quantcore.checkpoints.pickled import rewrite_pickled
from quantcore.errors import CheckpointError
from quantcore.nn import QuantizedLinear
from quantcore.testing.golden import golden_folder

GOLDEN = golden_folder("torchao", Path(__file__).parents[3] / "tests" / "golden")
OUTER = "torchao.dtypes.affine_quantized_tensor.AffineQuantizedTensor"
ROUNDED = "torchao.quantization.linear_activation_quantized_tensor.LinearActivationQuantizedTensor"
PLAIN = "torchao.dtypes.uintx.plain_layout.PlainAQTTensorImpl"
TILED = "torchao.dtypes.uintx.tensor_core_tiled_layout.TensorCoreTiledAQTTensorImpl"


class Old:
    """A tensor subclass of torchao, as its pickle has one: made by torch's own functions, with its parts as state."""

    def __init__(self, name: str, shape: tuple[int, ...], **state: Any) -> None:
        self.of, self.shape, self.state = kind(name), shape, state

    def __reduce__(self) -> Any:
        size = (self.of, torch.bfloat16, self.shape, (self.shape[1], 1), 0, torch.strided, torch.device("cpu"), False)
        made = torch._utils._rebuild_wrapper_subclass, self.of, size, self.state  # type: ignore[attr-defined]
        return torch._tensor._rebuild_from_type_v2, made  # type: ignore[attr-defined]


def kind(name: str) -> Any:
    """A class of that name in a module that is there while the test runs."""
    module, _, last = name.rpartition(".")
    parts = module.split(".")
    for length in range(1, len(parts) + 1):  # a module is imported after those above it
        made = sys.modules.setdefault(".".join(parts[:length]), types.ModuleType(".".join(parts[:length])))
    if not hasattr(made, last):
        setattr(made, last, type(last, (), {"__module__": module, "__qualname__": last}))
    return getattr(made, last)


@pytest.fixture(autouse=True)
def no_torchao_left(monkeypatch: pytest.MonkeyPatch) -> Any:
    before = dict(sys.modules)
    yield
    for name in set(sys.modules) - set(before):
        if name.startswith("torchao"):
            del sys.modules[name]


def write(folder: Path, weight: Any, quant_type: Any, **more: Any) -> Path:
    folder.mkdir()
    config = {"quant_method": "torchao", "quant_type": quant_type, **more}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    torch.save({"layer.weight": weight, "layer.bias": torch.ones(16)}, folder / "pytorch_model.bin")
    return folder


def loaded(folder: Path) -> QuantizedLinear:
    model = qc.load(folder, nn.ModuleDict({"layer": nn.Linear(64, 16)}).bfloat16())
    layer = model["layer"]  # type: ignore[index]
    assert isinstance(layer, QuantizedLinear)
    return layer


def plain(codes: Tensor, scale: Tensor, block: tuple[int, int], **more: Any) -> Old:
    zero = torch.zeros(scale.shape, dtype=torch.int64)
    impl = Old(PLAIN, tuple(codes.shape), int_data=codes, scale=scale, zero_point=zero)
    state = {"tensor_impl": impl, "block_size": block, "quant_min": None, "quant_max": None, **more}
    return Old(OUTER, tuple(codes.shape), zero_point_domain=None, **state)


@pytest.mark.parametrize("is_rounded", [False, True], ids=["float", "rounded"])
def test_int8_is_read(is_rounded: bool, tmp_path: Path) -> None:
    codes = torch.randint(-128, 128, (16, 64), dtype=torch.int8)
    scale = torch.rand(16).bfloat16()
    weight: Any = plain(codes, scale, (1, 64))
    if is_rounded:
        weight = Old(ROUNDED, (16, 64), original_weight_tensor=weight, input_quant_func=kind("torchao.quantization.f"))
    name = "int8_dynamic_activation_int8_weight" if is_rounded else "int8_weight_only"
    rewrite_pickled(write(tmp_path / "old", weight, name), tmp_path / "new")
    layer = loaded(tmp_path / "new")
    assert torch.equal(layer.dequantize(torch.bfloat16), (codes.float() * scale.float()[:, None]).bfloat16())
    assert (layer.format.input is not None) == is_rounded  # type: ignore[attr-defined]


def test_groups_of_four_bits_keep_scales_in_the_weights_dtype(tmp_path: Path) -> None:
    codes, scale = torch.randint(-8, 8, (16, 64), dtype=torch.int8), torch.rand(16, 2).bfloat16()
    weight = Old(ROUNDED, (16, 64), original_weight_tensor=plain(codes, scale, (1, 32), quant_min=-8, quant_max=7))
    rewrite_pickled(write(tmp_path / "old", weight, "int8_dynamic_activation_int4_weight"), tmp_path / "new")
    layer = loaded(tmp_path / "new")
    assert torch.equal(layer.dequantize(torch.bfloat16), codes.bfloat16() * scale.repeat_interleave(32, 1))


def test_tiles_are_taken_as_they_are(tmp_path: Path) -> None:
    config = {"quant_method": "torchao", "quant_type": "int4_weight_only", "quant_type_kwargs": {"group_size": 32}}
    made = QuantizedLinear.from_linear(nn.Linear(64, 16).bfloat16(), config)
    parts = {"packed_weight": made.stored["_weight_qdata"], "scale_and_zero": made.stored["_weight_scale_and_zero"]}
    weight = Old(OUTER, (16, 64), tensor_impl=Old(TILED, (16, 64), **parts), block_size=(1, 32))
    folder = write(tmp_path / "old", weight, "int4_weight_only", quant_type_kwargs={"group_size": 32})
    rewrite_pickled(folder, tmp_path / "new")
    assert torch.equal(loaded(tmp_path / "new").dequantize(), made.dequantize())


def test_layout_that_is_not_read_is_named(tmp_path: Path) -> None:
    impl = Old("torchao.dtypes.uintx.int4_cpu_layout.Int4CPUAQTTensorImpl", (16, 64), packed_weight=torch.zeros(1))
    weight = Old(OUTER, (16, 64), tensor_impl=impl, block_size=(1, 32))
    with pytest.raises(CheckpointError, match=r"layer\.weight: .*Int4CPUAQTTensorImpl"):
        rewrite_pickled(write(tmp_path / "old", weight, "int4_weight_only"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_old_models_of_the_golden_set_compute_upstreams_logits(tmp_path: Path) -> None:
    """The whole set has one; the selection in the repository has none, for it is large."""
    for folder in GOLDEN.glob("checkpoint-legacy-*"):
        rewrite_pickled(folder, tmp_path / folder.name)
        model, expected = qc.load(tmp_path / folder.name), load_file(folder / "expected.safetensors")
        with torch.no_grad():
            logits = model(expected["input_ids"]).logits
        assert (logits - expected["logits"]).norm() <= 2e-2 * expected["logits"].norm()
        layer = model.get_submodule("model.layers.0.self_attn.q_proj")
        assert isinstance(layer, QuantizedLinear)
        weight = load_file(folder / "expected-extra.safetensors")["layer0.q_proj.dequantized"]
        assert torch.equal(layer.dequantize(weight.dtype), weight)
