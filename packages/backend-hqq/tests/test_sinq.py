"""SINQ: golden layers and a golden folder, every width and tiling, what marks a folder, and the search with data."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantcore as qc
from quantcore.errors import CheckpointError
from quantcore.formats.families import Affine, Grouping
from quantcore.nn import QuantizedLinear
from quantcore.testing.compare import differences, relative_error
from quantcore.testing.golden import GoldenLayer, golden_folder
from quantcore_hqq.packing import pack
from quantcore_hqq.sinq import SIDECAR
from quantcore_hqq.sinq.config import SinqConfig
from quantcore_hqq.sinq.format import COLUMN_SCALE, SinqStrips, SinqTiles, sinq_format
from quantcore_hqq.sinq.levels import LEVELS, nearest
from quantcore_hqq.sinq.small_scales import grow, shrink
from quantcore_hqq.sinq.solver import sinkhorn

GOLDEN = golden_folder("sinq", Path(__file__).parents[3] / "tests" / "golden")
CASES = sorted(GOLDEN.glob("w*.safetensors"))
FOLDER = GOLDEN / "checkpoint-w4g64"
SINQ: dict[str, Any] = {"quant_method": "sinq"}


@pytest.fixture(params=CASES, ids=lambda file: file.stem)
def case(request: pytest.FixtureRequest) -> GoldenLayer:
    return GoldenLayer.read(request.param)


def quantized(case: GoldenLayer) -> QuantizedLinear:
    """The case's float layer, quantized, with data where its method reads some."""
    needs_data = case.config["method"] == "asinq"
    data = load_file(GOLDEN / "w4-g64-1d-asinq.safetensors")["calib.activations"] if needs_data else None
    return QuantizedLinear.from_linear(case.linear(), case.config, calibration=data)


def linear(rows: int = 64, columns: int = 128, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=False, dtype=dtype)


# Reading


def test_golden_set_covers_the_branches() -> None:
    assert {"w3-g64-1d", "w4-g64-2d", "w4-g64-1d-nf4-fp16", "w4-g64-1d-asinq", "w5-g64-1d"} <= {f.stem for f in CASES}


def test_stored_layer_dequantizes_to_golden_weight(case: GoldenLayer) -> None:
    assert torch.equal(case.layer().dequantize(case.weight.dtype), case.expected["weight"])


def test_state_dict_gives_back_the_golden_bytes(case: GoldenLayer) -> None:
    assert differences(case.layer().state_dict(), case.stored) == []


def test_forward_is_within_golden_tolerance(case: GoldenLayer) -> None:
    y, expected = case.layer()(case.expected["x"]), case.expected["y"]
    assert y.dtype == expected.dtype
    assert relative_error(y, expected) < 1e-2  # columns are scaled with the input, which rounds x and the weight apart


def test_rows_are_those_of_the_whole_weight(case: GoldenLayer) -> None:
    layer, rows = case.layer(), torch.tensor([3, 0, 63, 3])
    operands = layer.format.operands(layer.stored, layer.shape)
    found = layer.format.dequantize_rows(operands, layer.shape, rows, case.weight.dtype)
    assert torch.equal(found, case.expected["weight"][rows])


def test_words_of_five_and_six_bits() -> None:
    codes = torch.arange(1, 8, dtype=torch.uint8)[:, None]
    assert pack(codes, "5bit_32").flatten().tolist() == [0x02329C00, 0x04430000]
    assert pack(codes, "6bit_32").flatten().tolist() == [0x010C51C0, 0x02106000]


def test_codes_that_are_not_packed_are_told_by_their_number() -> None:
    made = QuantizedLinear.from_linear(linear(), {**SINQ, "nbits": 4, "group_size": 64})
    codes = made.format._codes(made.stored["W_q"], made.shape)  # type: ignore[attr-defined]
    for loose in (codes, codes.view(64, 128)):
        stored = {**made.stored, "W_q": loose}
        layer = QuantizedLinear.from_tensors({**SINQ, "nbits": 4}, stored, in_features=128, out_features=64)
        assert torch.equal(layer.dequantize(torch.float32), made.dequantize(torch.float32))
        assert differences(layer.state_dict(), stored) == []


def test_missing_tensor_is_named(case: GoldenLayer) -> None:
    del case.stored[COLUMN_SCALE]
    with pytest.raises(CheckpointError, match=r"meta\.scale2: missing"):
        case.layer()


def test_scales_that_do_not_divide_the_weight_are_refused() -> None:
    case = GoldenLayer.read(GOLDEN / "w4-g64-1d-nf4-fp16.safetensors")
    stored = {**case.stored, "meta.scale": torch.ones(7, 1, dtype=torch.float16)}
    with pytest.raises(CheckpointError, match="7 numbers do not divide"):
        QuantizedLinear.from_tensors(case.config, stored, in_features=128, out_features=64)


# Quantizing


def test_codes_are_those_of_the_golden_layer(case: GoldenLayer) -> None:
    found = quantized(case).stored["W_q"]
    # exp and log of other processors differ in the last bit, by which a value on the edge of two codes may fall.
    assert (found != case.stored["W_q"]).sum() <= found.numel() // 1000


def test_quantized_layer_is_the_golden_one_but_for_roundings(case: GoldenLayer) -> None:
    """Rows times c and columns over c are the same layer; which c is found last depends on the processor."""
    found = quantized(case).dequantize(torch.float32)
    wanted = case.layer().dequantize(torch.float32)
    assert relative_error(found, wanted) < 0.01  # scales in 8 bits differ by half a step


def test_layer_of_heavy_tails_is_rounded_as_it_is() -> None:
    case = GoldenLayer.read(GOLDEN / "w4-g64-1d-highkurtosis.safetensors")
    found = quantized(case).stored
    assert bool((found[COLUMN_SCALE] == 1).all())
    assert differences(found, case.stored) == []


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2, 1.58, 1])
@pytest.mark.parametrize("tiling", ["1D", "2D"])
@pytest.mark.parametrize("method", ["sinq", "sinq_hqq", "sinq_noz", "sinq_quantAux_hqq"])
def test_every_width_tiling_and_method_is_stored_and_read(bits: float, tiling: str, method: str) -> None:
    if "noz" in method and bits < 3:
        return
    config = {**SINQ, "nbits": bits, "tiling_mode": tiling, "method": method}
    layer = QuantizedLinear.from_linear(linear(128), config)
    again = QuantizedLinear.from_tensors(config, layer.state_dict(), in_features=128, out_features=128)
    assert torch.equal(again.dequantize(torch.float32), layer.dequantize(torch.float32))
    assert differences(again.state_dict(), layer.state_dict()) == []
    allowed = {1: 1.0, 1.58: 0.8, 2: 0.55, 3: 0.45 if "noz" in method else 0.3}
    assert relative_error(layer.dequantize(), linear(128).weight) < allowed.get(bits, 0.15)


@pytest.mark.parametrize(("method", "bits"), [("sinq_nf4", 4), ("sinq_nf3", 3), ("sinq_nf4_quantAux", 4)])
@pytest.mark.parametrize("tiling", ["1D", "2D"])
def test_levels_are_stored_and_read(method: str, bits: int, tiling: str) -> None:
    config = {**SINQ, "nbits": bits, "tiling_mode": tiling, "method": method}
    layer = QuantizedLinear.from_linear(linear(128, dtype=torch.bfloat16), config)
    again = QuantizedLinear.from_tensors(config, layer.state_dict(), in_features=128, out_features=128)
    assert type(layer.format) is SinqTiles
    assert torch.equal(again.dequantize(torch.bfloat16), layer.dequantize())
    assert layer(torch.ones(1, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert relative_error(layer.dequantize(), linear(128).weight) < (0.2 if bits == 4 else 0.3)


def test_strip_that_group_size_does_not_divide_has_narrower_tiles() -> None:
    layer = QuantizedLinear.from_linear(linear(64, 96), {**SINQ, "group_size": 64})
    assert (layer.stored["W_q"].shape, layer.format.tile) == ((96, 32), 32)  # type: ignore[attr-defined]
    again = QuantizedLinear.from_tensors(SINQ, layer.state_dict(), in_features=96, out_features=64)
    assert torch.equal(again.dequantize(torch.float32), layer.dequantize())


@pytest.mark.parametrize(
    ("shape", "config", "message"),
    [
        ((64, 72), {}, "in_features 72 is not a multiple of group_size 64"),
        ((64, 96), {"tiling_mode": "2D"}, "in_features 96 is not a multiple"),
        ((96, 128), {"tiling_mode": "2D"}, "out_features 96 is not a multiple"),
        ((33, 64), {"method": "sinq_hqq"}, "33 rows of codes"),
        ((8, 128), {}, "16 scales, which do not divide"),
    ],
)
def test_shape_that_cannot_be_stored_is_refused(shape: tuple[int, int], config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedLinear.from_linear(linear(*shape), {**SINQ, **config})


def test_tiles_are_made_even_as_if_each_were_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(2, 3, 16, 32, generator=generator) * torch.rand(2, 3, 16, 32, generator=generator)
    tiles[0, 1] = tiles[0, 1, :1, :1]  # of equal values, which ends after another number of steps
    rows, columns = sinkhorn(tiles)
    for place in itertools.product(range(2), range(3)):
        alone = sinkhorn(tiles[place])
        assert torch.equal(rows[place], alone[0])
        assert torch.equal(columns[place], alone[1])


@pytest.mark.parametrize("tiling", ["1D", "2D"])
@pytest.mark.parametrize("method", ["sinq_hqq", "sinq_nf4", "sinq_noz"])
def test_weight_is_solved_alike_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch, tiling: str, method: str) -> None:
    config = {**SINQ, "tiling_mode": tiling, "method": method}
    whole = QuantizedLinear.from_linear(linear(192, 256), config).state_dict()
    monkeypatch.setattr("quantcore_hqq.sinq.solver._ON_CPU", 1)
    assert differences(QuantizedLinear.from_linear(linear(192, 256), config).state_dict(), whole) == []


def test_values_beyond_float16_are_refused() -> None:
    big = linear()
    big.weight.data[0, 0] = 1e5
    with pytest.raises(ValueError, match="beyond 65504"):
        QuantizedLinear.from_linear(big, SINQ)


def test_nearest_level_of_a_tie_is_the_lower() -> None:
    levels = LEVELS["nf4"]
    middle = torch.tensor(levels[:2]).mean()
    values = torch.tensor([-9.0, -1.0, middle, 0.0, 9.0])
    distance = (values[:, None] - torch.tensor(levels)).abs()
    assert torch.equal(nearest(values, levels).long(), distance.argmin(1))


def test_column_of_equal_scales_keeps_them() -> None:
    values = torch.full((64,), 0.0123, dtype=torch.float16)
    codes, scale, offset = shrink(values, 32)
    assert not codes.any()
    assert torch.equal(grow(codes, scale, offset), values)


# With data


def test_data_lowers_the_error_of_outputs() -> None:
    dense, x = linear(128, 128), torch.randn(256, 128) * torch.logspace(-1.5, 1, 128)
    wanted = dense(x)
    errors = [
        relative_error(QuantizedLinear.from_linear(dense, {**SINQ, "nbits": 3, "method": m}, calibration=d)(x), wanted)
        for m, d in (("sinq", None), ("asinq", x))
    ]
    assert errors[1] < errors[0]


def test_without_data_asinq_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="calibration"):
        qc.quantize(nn.Sequential(linear()), {**SINQ, "method": "asinq"})


# The family


def test_numbers_of_groups_are_raised_where_float16_holds_them() -> None:
    codes = torch.randint(16, (64, 128), dtype=torch.uint8)
    scale = (torch.rand(128) + 0.5).half().float()
    family = Affine(codes, scale, torch.arange(128).float() % 16, Grouping(64), 4)
    stored_format = sinq_format(4, 64, "sinq", compute_dtype="float32")
    stored = stored_format.raise_(family)
    layer = QuantizedLinear.from_tensors(stored_format, stored, in_features=128, out_features=64)
    assert torch.equal(layer.dequantize(torch.float32), family.dequantize())
    with pytest.raises(ValueError, match="stores exactly"):
        sinq_format(4, 64, "sinq_quantAux", compute_dtype="float32").raise_(family)


def test_strips_lower_to_the_weight_before_its_columns_are_scaled(case: GoldenLayer) -> None:
    layer = case.layer()
    if not isinstance(layer.format, SinqStrips):
        assert layer.format.family is None
        return
    family = layer.format.untransformed().lower(layer.stored, layer.shape)
    assert torch.equal(family.dequantize() * layer.stored[COLUMN_SCALE].float(), layer.dequantize(torch.float32))


# Folders


def test_folder_computes_upstreams_logits_and_is_saved_as_it_was(tmp_path: Path) -> None:
    expected = load_file(FOLDER / "expected.safetensors")
    model = qc.load(FOLDER)
    with torch.no_grad():
        logits = model(expected["input_ids"]).logits
    assert relative_error(logits, expected["logits"]) < 2e-2  # accumulation in bfloat16
    qc.save(model, tmp_path / "saved")
    name = "model-00001-of-00001.safetensors"
    assert differences(load_file(tmp_path / "saved" / name), load_file(FOLDER / name)) == []
    assert (tmp_path / "saved" / SIDECAR).read_bytes() == (FOLDER / SIDECAR).read_bytes()
    index = "model.safetensors.index.json"
    given, made = (json.loads((path / index).read_text()) for path in (FOLDER, tmp_path / "saved"))
    assert made["weight_map"] == given["weight_map"]
    given, made = (json.loads((path / "config.json").read_text()) for path in (FOLDER, tmp_path / "saved"))
    assert (made["quantization_config"], made["sinq"]) == (given["quantization_config"], given["sinq"])


def _top(config: dict[str, Any]) -> None:
    del config["quantization_config"]


def _in_dict(config: dict[str, Any]) -> None:
    del config["sinq"], config["quantization_config"]["quant_method"], config["quantization_config"]["sinq"]
    del config["quantization_config"]["quantization_method"], config["quantization_config"]["backend"]
    config["quantization_config"]["approach"] = "SINQ"


def _nowhere(config: dict[str, Any]) -> None:
    del config["sinq"], config["quantization_config"]


@pytest.mark.parametrize("change", [_top, _in_dict, _nowhere])
def test_folder_is_known_by_any_of_its_marks(tmp_path: Path, change: Any) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "marked")
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(qc.load(folder)(ids).logits, qc.load(FOLDER)(ids).logits)


@pytest.mark.parametrize("mark", ["sinq", "is_sinq", "sinq_quantized", "sinq_version"])
def test_dict_without_a_method_is_known_by_its_marks(mark: str) -> None:
    config = qc.AutoQuantizationConfig.from_dict({mark: True, "nbits": 3})
    assert isinstance(config, SinqConfig)
    assert config.nbits == 3


def test_layers_are_read_as_the_sidecar_describes_them(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": linear(), "b": linear()})
    made = qc.quantize(model, {**SINQ, "nbits": 4})
    made["a"] = QuantizedLinear.from_linear(linear(), {**SINQ, "nbits": 3})
    qc.save(made, tmp_path / "mixed")
    loaded = qc.load(tmp_path / "mixed", lambda: nn.ModuleDict({"a": linear(), "b": linear()}))
    assert (loaded["a"].format.bits, loaded["b"].format.bits) == (3, 4)
    assert torch.equal(loaded["a"].dequantize(), made["a"].dequantize())


def test_sidecar_that_cannot_be_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "damaged")
    listed = json.loads((folder / SIDECAR).read_text())
    listed["model.layers.0.self_attn.q_proj"]["meta"]["nbits"] = 7
    (folder / SIDECAR).write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"q_proj\.meta\.nbits"):
        qc.load(folder)


def test_buffer_that_the_model_works_out_is_no_surplus(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()
            self.register_buffer("angles", torch.arange(4.0), persistent=False)

    made = qc.quantize(Model(), SINQ)
    qc.save(made, tmp_path / "with")
    file = next((tmp_path / "with").glob("*.safetensors"))
    assert torch.equal(load_file(file)["angles"], torch.arange(4.0))
    loaded = qc.load(tmp_path / "with", Model)
    assert torch.equal(loaded.linear.dequantize(), made.linear.dequantize())
    tensors: dict[str, Tensor] = {**load_file(file), "others": torch.zeros(2)}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="others"):
        qc.load(tmp_path / "with", Model)


# The config


def test_config_has_upstreams_fields_and_defaults() -> None:
    assert SinqConfig().to_dict() == {
        "quant_method": "sinq",
        "nbits": 4,
        "group_size": 64,
        "tiling_mode": "1D",
        "method": "sinq",
        "modules_to_not_convert": None,
    }


def test_spellings_are_read() -> None:
    config = SinqConfig(nbits="3", group_size=32.0, tiling_mode="2d", method="SINQ_NF3_QUANTAUX")  # type: ignore[arg-type]
    assert (config.nbits, config.group_size, config.tiling_mode) == (3, 32, "2D")
    assert config.method == "sinq_nf3_quantAux"


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"nbits": 7}, ValueError),
        ({"nbits": "many"}, ValueError),
        ({"nbits": 3.5}, ValueError),
        ({"group_size": None}, TypeError),
        ({"group_size": 12}, ValueError),
        ({"tiling_mode": "3D"}, ValueError),
        ({"method": "awqs"}, ValueError),
        ({"method": None}, TypeError),
        ({"method": "sinq_nf4", "nbits": 3}, ValueError),
        ({"method": "sinq_noz", "nbits": 2}, ValueError),
        ({"modules_to_not_convert": "lm_head"}, TypeError),
    ],
)
def test_what_cannot_be_is_refused_by_field(values: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"SinqConfig\."):
        SinqConfig(**values)


def test_published_dict_survives_a_round_trip() -> None:
    given = json.loads((FOLDER / "config.json").read_text())["quantization_config"]
    assert SinqConfig.from_dict(given).to_dict() == given


def test_head_is_quantized_unless_it_is_listed() -> None:
    def model() -> nn.ModuleDict:
        return nn.ModuleDict({"body": linear(), "lm_head": linear()})

    assert isinstance(qc.quantize(model(), SINQ)["lm_head"], QuantizedLinear)
    kept = qc.quantize(model(), {**SINQ, "modules_to_not_convert": ["lm_head"]})
    assert type(kept["lm_head"]) is nn.Linear
