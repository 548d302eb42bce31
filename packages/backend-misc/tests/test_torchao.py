"""torchao: configs of every age, headers of files both ways, tiles, and what upstream leaves out or gets wrong."""

from __future__ import annotations

import copy
import enum
import json
import pickle
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantcore as qc
from quantcore.errors import CheckpointError
from quantcore.nn import QuantizedEmbedding, QuantizedLinear
from quantcore.testing.compare import differences
from quantcore.testing.golden import golden_facts, golden_folder
from quantcore_misc.torchao.config import TorchAoConfig
from quantcore_misc.torchao.format import int8_format
from quantcore_misc.torchao.tinygemm import tiled_format

GOLDEN = golden_folder("torchao", Path(__file__).parents[3] / "tests" / "golden")
LAYERS = sorted(file for file in GOLDEN.glob("*.safetensors") if file.with_suffix(".json").exists())
UNMEASURED = [file for file in LAYERS if not file.stem.startswith("static-")]
MODEL = GOLDEN / "checkpoint-fqn-int8-int4"
FILE = "model.safetensors"


def entry(kind: str, version: int = 2, **data: Any) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": data}


def config_of(quant_type: Any, **more: Any) -> dict[str, Any]:
    wrapped = {"default": quant_type} if isinstance(quant_type, dict) else quant_type
    return {"quant_method": "torchao", "quant_type": wrapped, **more}


def read(quant_type: Any, **more: Any) -> TorchAoConfig:
    config = qc.AutoQuantizationConfig.from_dict(config_of(quant_type, **more))
    assert isinstance(config, TorchAoConfig)
    return config


def fields(quant_type: Any, **more: Any) -> dict[str, Any]:
    written: dict[str, Any] = read(quant_type, **more).to_dict()["quant_type"]["default"]
    return written


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        found: dict[str, str] = opened.metadata()
    return found


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data = weight
    return linear


# Configs

PER_ROW = entry("PerRow", 1, dim=-1)
PER_32 = entry("PerGroup", 1, group_size=32)
INT4 = {"_type": "torch.dtype", "_data": "int4"}
OLD = [
    pytest.param("int4_weight_only", {"group_size": 64}, "Int4WeightOnlyConfig", {"group_size": 64}, id="int4"),
    pytest.param("int8_weight_only", {}, "Int8WeightOnlyConfig", {"granularity": PER_ROW}, id="int8"),
    pytest.param("int8_weight_only", {"group_size": 32}, "Int8WeightOnlyConfig", {"granularity": PER_32}, id="groups"),
    pytest.param(
        "int8_dynamic_activation_int8_weight", {}, "Int8DynamicActivationInt8WeightConfig", {}, id="int8-int8"
    ),
    pytest.param(
        "int8_dynamic_activation_int4_weight",
        {},
        "Int8DynamicActivationIntxWeightConfig",
        {"weight_dtype": INT4, "weight_granularity": PER_32},
        id="int8-int4",
    ),
    pytest.param("float8_weight_only", {}, "Float8WeightOnlyConfig", {"granularity": PER_ROW}, id="float8"),
    pytest.param(
        "int4_weight_only",
        {"group_size": 128, "layout": ["TensorCoreTiledLayout", {"inner_k_tiles": 8}], "use_hqq": True},
        "Int4WeightOnlyConfig",
        {"int4_choose_qparams_algorithm": {"_type": "Int4ChooseQParamsAlgorithm", "_data": "HQQ"}},
        id="int4-hqq",
    ),
]


@pytest.mark.parametrize(("name", "kwargs", "kind", "some"), OLD)
def test_name_of_2024_is_read_as_the_class_of_today(
    name: str, kwargs: dict[str, Any], kind: str, some: dict[str, Any]
) -> None:
    written = fields(name, quant_type_kwargs=kwargs)
    assert (written["_type"], written["_version"]) == (kind, 2)
    assert {key: written["_data"][key] for key in some} == some


def test_int4_of_2024_is_packed_in_tiles() -> None:
    packing = fields("int4_weight_only", quant_type_kwargs={"group_size": 32})["_data"]["int4_packing_format"]
    assert packing == {"_type": "Int4PackingFormat", "_data": "TILE_PACKED_TO_4D"}


def test_class_of_version_1_is_written_as_version_2() -> None:
    layout = {"_type": "TensorCoreTiledLayout", "_data": {"inner_k_tiles": 8}}
    old = entry("Int4WeightOnlyConfig", 1, group_size=64, layout=layout, use_hqq=True, zero_point_domain=None)
    written = fields(old)
    assert written == fields(
        entry(
            "Int4WeightOnlyConfig",
            group_size=64,
            int4_packing_format={"_type": "Int4PackingFormat", "_data": "TILE_PACKED_TO_4D"},
            int4_choose_qparams_algorithm={"_type": "Int4ChooseQParamsAlgorithm", "_data": "HQQ"},
        )
    )
    assert written["_version"] == 2
    int8 = {"_type": "Int8WeightOnlyConfig", "_data": {"group_size": None}}  # without a version: 1
    assert fields(int8) == fields("Int8WeightOnlyConfig")


def test_config_of_the_pickled_models_is_read() -> None:
    old = read(entry("Int8WeightOnlyConfig", 1, group_size=None, set_inductor_config=True), quant_type_kwargs={})
    assert old == read("Int8WeightOnlyConfig")


@pytest.mark.parametrize("key", ["fqn_to_config", "module_fqn_to_config"])
@pytest.mark.parametrize("kind", ["FqnToConfig", "ModuleFqnToConfig"])
def test_configs_by_name_are_written_under_both_keys(kind: str, key: str) -> None:
    written = fields(entry(kind, 1, **{key: {"first": entry("Int8WeightOnlyConfig"), "second": None}}))
    assert written["_type"] == "FqnToConfig"
    both = written["_data"]["fqn_to_config"], written["_data"]["module_fqn_to_config"]
    assert both[0] == both[1] == {"first": fields("Int8WeightOnlyConfig"), "second": None}


def test_name_goes_before_pattern_and_parameter_before_module() -> None:
    kinds = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig", "Int4WeightOnlyConfig")
    int8, float8, intx, int4 = map(entry, kinds)
    config = read(
        entry(
            "FqnToConfig",
            1,
            fqn_to_config={
                "re:.*proj": int8,
                r"re:.*\.up_proj\.weight": float8,
                "model.q_proj": intx,
                "model.k_proj": None,
                "_default": int4,
            },
        )
    )
    found = {name: config.for_layer(f"model.{name}") for name in ("q_proj", "k_proj", "up_proj", "o_proj", "head")}
    assert found == {"q_proj": kinds[2], "k_proj": None, "up_proj": kinds[1], "o_proj": kinds[0], "head": kinds[3]}


def test_layer_that_no_name_fits_stays_float() -> None:
    config = read(entry("FqnToConfig", 1, fqn_to_config={"first": entry("Int8WeightOnlyConfig")}))
    assert config.for_layer("second") is None


class Packing(str, enum.Enum):
    """Named as torchao's own, in effect."""

    PLAIN = "plain"


class Row(NamedTuple):
    dim: int = -1


@dataclass
class Int4WeightOnlyConfig:
    """What torchao has for it, as far as its config.json goes."""

    group_size: int = 64
    set_inductor_config: bool = True
    int4_packing_format: Packing = Packing.PLAIN
    version: int = 2
    _hidden: int = field(default=0)


def test_object_of_torchao_is_taken_without_torchao() -> None:
    config = TorchAoConfig(quant_type=Int4WeightOnlyConfig())  # type: ignore[arg-type]
    data = config.to_dict()["quant_type"]["default"]["_data"]
    assert data["group_size"] == 64
    assert data["int4_packing_format"] == {"_type": "Packing", "_data": "PLAIN"}
    assert "_hidden" not in data


REFUSED = [
    pytest.param("autoquant", ValueError, "autoquant is not supported", id="autoquant"),
    pytest.param("int5_weight_only", ValueError, "int4_weight_only", id="name"),
    pytest.param(entry("Int9WeightOnlyConfig"), ValueError, "Int9WeightOnlyConfig", id="class"),
    pytest.param(7, TypeError, "quant_type", id="number"),
    pytest.param(entry("Int8WeightOnlyConfig", 3), ValueError, "version 3", id="version"),
    pytest.param(entry("Int8WeightOnlyConfig", group_size=32), ValueError, "granularity of PerGroup", id="int8-groups"),
    pytest.param(entry("Int8WeightOnlyConfig", width=32), ValueError, "no width", id="field"),
    pytest.param(entry("Int4WeightOnlyConfig", group_size=48), ValueError, "group_size", id="group_size"),
    pytest.param(entry("Int4WeightOnlyConfig", int4_packing_format="flat"), ValueError, "packing_format", id="packing"),
    pytest.param(
        entry("Int4WeightOnlyConfig", int4_choose_qparams_algorithm="hqq"), ValueError, "tile_packed_to_4d", id="hqq"
    ),
    pytest.param(entry("IntxWeightOnlyConfig", weight_dtype="int9"), ValueError, "weight_dtype", id="bits"),
    pytest.param(
        entry("Int8WeightOnlyConfig", granularity=entry("PerGroup", 1, group_size=-1)),
        ValueError,
        "PerGroup",
        id="size",
    ),
    pytest.param(
        entry("Int4WeightOnlyConfig", 1, layout={"_type": "MarlinSparseLayout", "_data": {}}),
        ValueError,
        "MarlinSparseLayout",
        id="layout",
    ),
    pytest.param(
        entry("FqnToConfig", 1, fqn_to_config={"a": None}, module_fqn_to_config={"b": None}),
        ValueError,
        "but differ",
        id="two-maps",
    ),
    pytest.param(entry("FqnToConfig", 1, fqn_to_config={"re:(": None}), ValueError, "re:", id="pattern"),
]


@pytest.mark.parametrize(("quant_type", "error", "text"), REFUSED)
def test_config_that_no_layer_can_have_is_refused(quant_type: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        read(quant_type)


def test_dict_without_default_is_refused() -> None:
    with pytest.raises(ValueError, match="one key 'default'"):
        qc.AutoQuantizationConfig.from_dict({"quant_method": "torchao", "quant_type": {"other": entry("PerRow")}})


def test_config_is_copied_and_pickled() -> None:
    config = read(entry("Int4WeightOnlyConfig", group_size=32))
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301  # made here
    assert config.quant_type == "Int4WeightOnlyConfig"


@pytest.mark.parametrize(
    "quant_type",
    [
        entry("Int4WeightOnlyConfig", int4_packing_format="preshuffled"),
        entry("IntxWeightOnlyConfig", intx_packing_format="opaque_torchao_auto"),
        entry("Float8DynamicActivationFloat8WeightConfig", packing_format="sparse_2d_data_2d_metadata"),
        entry("Float8DynamicActivationInt4WeightConfig", 1),
    ],
    ids=["preshuffled", "opaque", "sparse", "float8-int4"],
)
def test_packing_that_files_do_not_hold_is_read_and_not_made(quant_type: dict[str, Any]) -> None:
    assert fields(quant_type)["_type"] == quant_type["_type"]
    with pytest.raises(ValueError, match="layer"):
        QuantizedLinear.from_linear(nn.Linear(128, 32), config_of(quant_type), name="layer")


# Files


def test_golden_set_has_layers() -> None:
    assert len(LAYERS) >= 7


@pytest.mark.parametrize("file", UNMEASURED, ids=lambda file: file.stem)
def test_header_of_a_quantized_layer_is_upstreams(file: Path, tmp_path: Path) -> None:
    facts, tensors = golden_facts(file), load_file(file)
    model = nn.ModuleDict({"layer": linear_of(tensors["input.weight"])})
    qc.save(qc.quantize(model, facts["quantization_config"]), tmp_path / "saved")
    found, wanted = metadata(tmp_path / "saved" / FILE), facts["safetensors_metadata"]
    assert found["layer.weight"] == wanted["layer.weight"]
    assert json.loads(found["tensor_names"]) == ["layer.weight"]


@pytest.mark.parametrize("file", [file for file in LAYERS if "tile" in file.stem], ids=lambda file: file.stem)
def test_tiles_have_upstreams_bytes(file: Path) -> None:
    tensors, facts = load_file(file), golden_facts(file)
    found = QuantizedLinear.from_linear(linear_of(tensors["input.weight"]), facts["quantization_config"])
    stored = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("layer.")}
    assert torch.equal(found.stored["_weight_qdata"], stored["_weight_qdata"])
    # Zero points of "hqq" are means of sums, which processors add in other orders.
    torch.testing.assert_close(found.stored["_weight_scale_and_zero"], stored["_weight_scale_and_zero"])


def test_model_is_saved_byte_for_byte(tmp_path: Path) -> None:
    qc.save(qc.load(MODEL), tmp_path / "saved")
    assert (tmp_path / "saved" / FILE).read_bytes() == (MODEL / FILE).read_bytes()
    given, made = (json.loads((path / "config.json").read_text()) for path in (MODEL, tmp_path / "saved"))
    assert made["quantization_config"] == given["quantization_config"]


def test_shards_say_the_same_of_all_tensors(tmp_path: Path) -> None:
    qc.save(qc.load(MODEL), tmp_path / "saved", max_shard_size="100KB")
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2
    assert all(metadata(file) == metadata(MODEL / FILE) for file in files)


def test_float_model_is_quantized_file_to_file_with_the_same_header(tmp_path: Path) -> None:
    config = json.loads((MODEL / "config.json").read_text())["quantization_config"]
    qc.save(qc.dequantize(qc.load(MODEL)), tmp_path / "float")
    assert "tensor_names" not in metadata(tmp_path / "float" / FILE)
    qc.quantize_checkpoint(tmp_path / "float", tmp_path / "made", config)
    found, wanted = metadata(tmp_path / "made" / FILE), metadata(MODEL / FILE)
    names = [json.loads(each.pop("tensor_names")) for each in (found, wanted)]
    assert found == wanted
    assert sorted(names[0]) == sorted(names[1])


def test_header_says_what_the_config_does_not(tmp_path: Path) -> None:
    folder = shutil.copytree(MODEL, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config_of("Int8WeightOnlyConfig")
    (folder / "config.json").write_text(json.dumps(config))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(qc.load(folder)(ids).logits, qc.load(MODEL)(ids).logits)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ('{"_type": "Int4OpaqueTensor", "_data": {}}', "Int4OpaqueTensor"),
        ('{"_type": "Int8Tensor", "_data": {"block_size": 3}}', "described wrongly"),
        ('{"_type": "Int8Tensor"}', "no description"),
    ],
    ids=["class", "block", "data"],
)
def test_header_that_cannot_be_is_refused_by_name(said: str, text: str, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    folder = shutil.copytree(MODEL, tmp_path / "damaged")
    save_file(load_file(MODEL / FILE), folder / FILE, {**metadata(MODEL / FILE), name: said})
    with pytest.raises((CheckpointError, ValueError), match=text) as caught:
        qc.load(folder)
    assert name.removesuffix(".weight") in str(caught.value)


def test_converted_away_nothing_of_the_header_is_left(tmp_path: Path) -> None:
    done = qc.convert(MODEL, tmp_path / "made", config_of("Int8WeightOnlyConfig"), allow_lossy=True)
    assert done.exact
    assert "Int8Tensor" in metadata(tmp_path / "made" / FILE)["model.layers.0.mlp.up_proj.weight"]
    qc.convert(MODEL, tmp_path / "float")
    assert set(metadata(tmp_path / "float" / FILE)) == {"format"}


def test_converted_to_torchao_the_header_names_every_tensor(tmp_path: Path) -> None:
    qc.convert(MODEL, tmp_path / "other", {"quant_method": "quanto", "weights": "int8"}, allow_lossy=True)
    qc.convert(tmp_path / "other", tmp_path / "back", config_of("Int8WeightOnlyConfig"), allow_lossy=True)
    found, names = metadata(tmp_path / "back" / FILE), set(load_file(tmp_path / "back" / FILE))
    listed = json.loads(found["tensor_names"])
    assert set(listed) == {name.replace("._weight_qdata", ".weight") for name in names if "_weight_s" not in name} - {
        name for name in names if "zero_point" in name
    }
    assert set(listed) < set(found)


def test_pickled_model_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(MODEL, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"lm_head.weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is pickled"):
        qc.load(folder)


# Formats


@pytest.mark.parametrize("shape", [(8, 1024), (20, 512), (1, 32), (9, 1056)], ids=str)
def test_tiles_are_unpacked_as_they_were_packed(shape: tuple[int, int]) -> None:
    made = tiled_format(32)
    stored = made.quantize(torch.randn(shape).bfloat16())
    parts = made.parts(stored, shape)
    assert differences(made.store(parts), stored) == []
    assert made.faults(stored, shape) == []


def test_word_of_a_tile_holds_its_codes_in_the_order_of_a_warp() -> None:
    made = tiled_format(32)
    codes = (torch.arange(1024) % 16).to(torch.int8)[None].expand(8, 1024) - 8
    assert made.pack(codes)["_weight_qdata"][0, 0, 0, 0].item() == 0x91918080 - (1 << 32)


def test_plain_int4_puts_even_columns_first() -> None:
    linear = linear_of(torch.tensor([[-8.0, 7.0, -1.0, 0.0] + [0.0] * 28]))
    layer = QuantizedLinear.from_linear(linear, config_of(entry("Int4WeightOnlyConfig", group_size=32)))
    assert layer.stored["_weight_qdata"][0, :2].view(torch.uint8).tolist() == [0x78, 0x0F]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR"])
def test_integers_of_every_width_stay_near_the_weight(bits: int, mapping: str) -> None:
    config = entry("IntxWeightOnlyConfig", weight_dtype=f"int{bits}", granularity=PER_32, mapping_type=mapping.lower())
    linear = nn.Linear(64, 16)
    layer = QuantizedLinear.from_linear(linear, config_of(config))
    step = linear.weight.abs().max() * 2 / max(1, 2**bits - 2)
    assert (layer.dequantize() - linear.weight).abs().max() <= step


def test_scales_by_least_squares_are_better_than_by_range() -> None:
    linear = nn.Linear(256, 32)
    ids = {"weight_dtype": "int3", "granularity": PER_32}
    errors = [
        (QuantizedLinear.from_linear(linear, config_of(config)).dequantize() - linear.weight).norm()
        for config in (
            entry("IntxWeightOnlyConfig", **ids, intx_choose_qparams_algorithm="hqq_scale_only"),
            entry("IntxWeightOnlyConfig", **ids),
        )
    ]
    assert errors[0] < errors[1]


def test_code_out_of_its_bits_is_named() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(32, 4), config_of(entry("IntxWeightOnlyConfig", weight_dtype="int4")))
    layer.stored["_weight_qdata"][0, 0] = 8
    (fault,) = layer.format.value_faults(layer.stored, layer.shape)
    assert "_weight_qdata" in fault
    assert "4 bits" in fault


def test_zero_points_may_be_missing() -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(32, 16), config_of("Int8WeightOnlyConfig"))
    stored = {name: tensor for name, tensor in layer.state_dict().items() if "zero_point" not in name}
    other = QuantizedLinear.from_tensors(config_of("Int8WeightOnlyConfig"), stored, in_features=32, out_features=16)
    assert torch.equal(other.dequantize(), layer.dequantize())
    assert differences(other.state_dict(), stored) == []


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_scale_before_the_layer_is_applied(kind: str) -> None:
    layer = QuantizedLinear.from_linear(nn.Linear(32, 16), config_of(kind))
    factor = torch.rand(32) + 0.5
    stored = {**layer.state_dict(), "_weight_act_pre_scale": factor}
    other = QuantizedLinear.from_tensors(config_of(kind), stored, in_features=32, out_features=16)
    x = torch.randn(3, 32)
    torch.testing.assert_close(other(x), layer(x * factor))


def test_row_of_zeros_stays_zero_in_float8() -> None:
    linear = nn.Linear(32, 16, bias=False)
    linear.weight.data[3] = 0
    layer = QuantizedLinear.from_linear(linear, config_of("Float8WeightOnlyConfig"))
    assert torch.equal(layer.dequantize()[3], torch.zeros(32))
    assert layer.dequantize().isfinite().all()


def test_float8_blocks_and_bounds_of_inputs() -> None:
    blocks = [entry("PerBlock", 1, block_size=size) for size in ([1, 128], [128, 128])]
    config = entry("Float8DynamicActivationFloat8WeightConfig", granularity=blocks, activation_value_ub=2.0)
    linear, x = nn.Linear(256, 128, bias=False).bfloat16(), torch.randn(3, 256).bfloat16()
    layer = QuantizedLinear.from_linear(linear, config_of(config))
    assert layer.stored["_weight_scale"].shape == (1, 2)
    torch.testing.assert_close(layer(x), linear(x.clamp(-2, 2)), atol=0.08, rtol=0.08)


def test_reduced_range_halves_the_codes() -> None:
    config = entry("Int8DynamicActivationInt8WeightConfig", reduce_range=True)
    layer = QuantizedLinear.from_linear(nn.Linear(64, 16), config_of(config))
    codes = layer.stored["_weight_qdata"]
    assert codes.min() >= -64
    assert codes.max() <= 63
    x = torch.randn(5, 64)
    rounded = layer.format.quantize_input(x, layer.stored).codes  # type: ignore[attr-defined]
    assert rounded.min() >= -64
    assert rounded.max() <= 63


def test_layer_that_groups_do_not_divide_stays_float() -> None:
    model = nn.ModuleDict({"fits": nn.Linear(64, 16), "not": nn.Linear(48, 16)})
    qc.quantize(model, config_of(entry("Int4WeightOnlyConfig", group_size=32)))
    assert isinstance(model["fits"], QuantizedLinear)
    assert type(model["not"]) is nn.Linear


def test_embedding_is_quantized_where_the_config_says_so() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(32, 64), "layer": nn.Linear(64, 64)})
    qc.quantize(model, config_of("Int8WeightOnlyConfig", include_input_output_embeddings=True))
    assert isinstance(model["embed"], QuantizedEmbedding)
    assert set(model["embed"].state_dict()) == {"_weight_qdata", "_weight_scale", "_weight_zero_point"}


def test_symmetric_int8_is_carried_over_exactly() -> None:
    made = int8_format((1, 0), "float32")
    stored = made.quantize(torch.randn(8, 32))
    assert differences(made.raise_(made.lower(stored, (8, 32))), stored) == []
