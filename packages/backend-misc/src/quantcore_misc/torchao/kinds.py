"""The config classes of torchao as data: their fields and defaults, and what older versions wrote in their place.

Source: torchao 0.18, quantization/quant_api.py; transformers 4.46 to 4.57 for the names of 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from quantcore_misc.torchao.words import completed, described, dtype_word, granularity, is_object, member, word

FQN = "FqnToConfig"
INT4, INT8, INT8_ROUNDED = "Int4WeightOnlyConfig", "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"
FLOAT8, FLOAT8_ROUNDED = "Float8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig"
INTX, INTX_ROUNDED = "IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig"
INT8_STATIC, FLOAT8_INT4 = "Int8StaticActivationInt8WeightConfig", "Float8DynamicActivationInt4WeightConfig"
NVFP4, NVFP4_ROUNDED = "NVFP4WeightOnlyConfig", "NVFP4DynamicActivationNVFP4WeightConfig"
MX_ROUNDED = "MXDynamicActivationMXWeightConfig"

_ROW = described("PerRow", {"dim": -1})
_SYMMETRIC, _ASYMMETRIC = member("MappingType", "SYMMETRIC"), member("MappingType", "ASYMMETRIC")
_E4M3, _INT8 = dtype_word("float8_e4m3fn"), dtype_word("int8")
_UNPACKED = {
    "intx_packing_format": member("IntxPackingFormat", "UNPACKED_TO_INT8"),
    "intx_choose_qparams_algorithm": member("IntxChooseQParamsAlgorithm", "AFFINE"),
}
_FAST = described("Float8MMConfig", {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False})
_AUTO = member("KernelPreference", "AUTO")


class Kind(NamedTuple):
    """Today's version of a class, and its fields with their defaults as config.json has them."""

    version: int
    fields: Mapping[str, Any]


KINDS: dict[str, Kind] = {
    INT4: Kind(
        2,
        {
            "group_size": 128,
            "set_inductor_config": True,
            "int4_packing_format": member("Int4PackingFormat", "PLAIN"),
            "int4_choose_qparams_algorithm": member("Int4ChooseQParamsAlgorithm", "TINYGEMM"),
            "int4_tile_packed_ntile": 8,
        },
    ),
    INT8: Kind(2, {"group_size": None, "granularity": _ROW, "set_inductor_config": True}),
    INT8_ROUNDED: Kind(
        2,
        {
            "act_mapping_type": _SYMMETRIC,
            "weight_only_decode": False,
            "granularity": _ROW,
            "set_inductor_config": True,
            "reduce_range": False,
        },
    ),
    INT8_STATIC: Kind(
        1,
        {
            "act_quant_scale": None,
            "act_quant_zero_point": None,
            "granularity": _ROW,
            "act_mapping_type": _SYMMETRIC,
            "set_inductor_config": True,
            "reduce_range": False,
        },
    ),
    FLOAT8: Kind(2, {"weight_dtype": _E4M3, "set_inductor_config": True, "granularity": _ROW}),
    FLOAT8_ROUNDED: Kind(
        2,
        {
            "activation_dtype": _E4M3,
            "weight_dtype": _E4M3,
            "granularity": [described("PerTensor", {}), described("PerTensor", {})],
            "packing_format": member("Float8PackingFormat", "PLAIN"),
            "mm_config": _FAST,
            "activation_value_lb": None,
            "activation_value_ub": None,
            "kernel_preference": _AUTO,
            "set_inductor_config": True,
            "alg_id": 0,
        },
    ),
    INTX: Kind(
        2,
        {
            "weight_dtype": _INT8,
            "granularity": described("PerAxis", {"axis": 0}),
            "mapping_type": _SYMMETRIC,
            "scale_dtype": None,
            **_UNPACKED,
        },
    ),
    INTX_ROUNDED: Kind(
        2,
        {
            "weight_dtype": _INT8,
            "weight_granularity": described("PerGroup", {"group_size": 32}),
            "weight_mapping_type": _SYMMETRIC,
            "weight_scale_dtype": None,
            "act_mapping_type": _ASYMMETRIC,
            **_UNPACKED,
        },
    ),
    FLOAT8_INT4: Kind(1, {"int4_packing_format": "preshuffled"}),
    NVFP4: Kind(1, {"use_dynamic_per_tensor_scale": True}),
    NVFP4_ROUNDED: Kind(1, {"use_triton_kernel": True, "use_dynamic_per_tensor_scale": True, "step": None}),
    MX_ROUNDED: Kind(
        1,
        {
            "block_size": 32,
            "activation_dtype": _E4M3,
            "weight_dtype": _E4M3,
            "kernel_preference": _AUTO,
            "scaling_mode": member("ScaleCalculationMode", "RCEIL"),
        },
    ),
    FQN: Kind(1, {"fqn_to_config": {}, "module_fqn_to_config": {}}),
}
_MAPPINGS = ("symmetric", "asymmetric", "symmetric_no_clipping_err")
# What may stand in a field, in small letters.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "int4_packing_format": ("plain", "preshuffled", "plain_int32", "tile_packed_to_4d"),
    "int4_choose_qparams_algorithm": ("tinygemm", "hqq"),
    "intx_packing_format": (
        "unpacked_to_int8",
        *(f"opaque_{name}" for name in ("aten_kleidiai", "torchao_auto", "torchao_kleidiai", "torchao_lowbit")),
    ),
    "intx_choose_qparams_algorithm": ("affine", "hqq_scale_only"),
    "packing_format": ("plain", "sparse_2d_data_2d_metadata", "sparse_1d_data_1d_metadata"),
    "act_mapping_type": _MAPPINGS[:2],
    "mapping_type": _MAPPINGS,
    "weight_mapping_type": _MAPPINGS,
    "kernel_preference": ("auto", "torch", "mslk", "emulated", "triton"),
    "scaling_mode": ("floor", "rceil", "ceil", "even"),
    "step": ("prepare", "convert"),
}
_DTYPES = {
    INTX: tuple(f"int{bits}" for bits in range(1, 9)),
    INTX_ROUNDED: tuple(f"int{bits}" for bits in range(1, 9)),
    FLOAT8: ("float8_e4m3fn", "float8_e5m2"),
    FLOAT8_ROUNDED: ("float8_e4m3fn", "float8_e5m2"),
    MX_ROUNDED: ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn_x2", "fp6_e2m3", "fp6_e3m2"),
}
_GROUP_SIZES = (32, 64, 128, 256)

# Layouts of version 1, and the packing of int4 weights that took their place.
_INT4_LAYOUTS = {"TensorCoreTiledLayout": "TILE_PACKED_TO_4D", "PlainLayout": "PLAIN", "Int4CPULayout": "PLAIN"}
_PLAIN_LAYOUTS = ("PlainLayout", "QDQLayout", "CutlassInt4PackedLayout")
_OLD_FIELDS = ("layout", "use_hqq", "zero_point_domain", "preserve_zero", "inner_k_tiles", "packing_bitwidth")
_RENAMED = {"ModuleFqnToConfig": FQN}
_INT8_INT4 = "Int8DynamicActivationInt4WeightConfig"
# The names that transformers took until 4.57, with the class of each.
NAMES_OF_2024 = {
    "int4_weight_only": INT4,
    "int8_weight_only": INT8,
    "int8_dynamic_activation_int8_weight": INT8_ROUNDED,
    "int8_dynamic_activation_int4_weight": _INT8_INT4,
    "float8_weight_only": FLOAT8,
    "float8_dynamic_activation_float8_weight": FLOAT8_ROUNDED,
}
_REMOVED = {
    "autoquant": "it chose a kernel for each layer by timing it, and stored nothing that can be read",
    "uintx_weight_only": "torchao removed its layout",
    "fpx_weight_only": "torchao removed its layout",
    "UIntXWeightOnlyConfig": "torchao removed its layout",
    "FPXWeightOnlyConfig": "torchao removed its layout",
    "GemliteUIntXWeightOnlyConfig": "its layout is that of another package's kernels",
    "Int8DynamicActivationInt8SemiSparseWeightConfig": "its sparse layout was never stored in files of tensors",
}


def read_kind(value: Mapping[str, Any], label: str) -> tuple[str, dict[str, Any]]:
    """Class and fields of a config as config.json has it, of any version, as today's version writes it.

    Raises ValueError naming label for an unknown class or version, unknown fields, and values that no field takes.
    """
    kind, data = value.get("_type"), value.get("_data")
    if not isinstance(kind, str) or not isinstance(data, Mapping):
        raise ValueError(
            f"{label} must have _type, the name of a config class, and _data, its fields; got {value!r:.80}"
        )
    kind, data, version = _RENAMED.get(kind, kind), dict(data), value.get("_version", 1)
    if kind == _INT8_INT4:
        kind, data, version = INTX_ROUNDED, _of_int8_int4(data), 2
    if kind not in KINDS:
        raise ValueError(unknown(kind, label))
    if kind == FQN:
        return kind, _read_names(data, label)
    if version == 1 and KINDS[kind].version == 2:
        data, version = _of_version_1(kind, data, label), 2
    if version != KINDS[kind].version:
        raise ValueError(f"{label}: version {version!r:.20} of {kind} is not known, only {KINDS[kind].version}")
    surplus: list[str] = sorted(set(data) - set(KINDS[kind].fields))
    if surplus:
        raise ValueError(f"{label}: {kind} has no {', '.join(surplus)}; its fields are {', '.join(KINDS[kind].fields)}")
    fields = {**KINDS[kind].fields, **{key: completed(item) for key, item in data.items()}}
    if kind == FLOAT8_ROUNDED:
        fields |= _rounded_float8(fields, label)
    check_fields(kind, fields, f"{label}: {kind}")
    return kind, fields


def of_2024(name: str, given: Mapping[str, Any], label: str) -> tuple[str, dict[str, Any]]:
    """Class and fields of what a name of 2024, or of a class, asks for, with its quant_type_kwargs."""
    kind = NAMES_OF_2024.get(name, name)
    version = KINDS[kind].version if kind in KINDS and kind == name else 1
    data = dict(given)
    layout = data.get("layout")
    if isinstance(layout, list) and layout and isinstance(layout[0], str):
        data["layout"] = {"_type": layout[0], "_data": layout[1] if len(layout) > 1 else {}}
    if kind not in KINDS and kind != _INT8_INT4:
        raise ValueError(unknown(name, label))
    return read_kind(described(kind, data, version), label)


def unknown(name: str, label: str) -> str:
    """Why a class or a name cannot be read."""
    if name in _REMOVED:
        return f"{label}: {name} is not supported: {_REMOVED[name]}; choose one of {', '.join(KINDS)}"
    known = ", ".join((*KINDS, *NAMES_OF_2024))
    return f"{label} must be one of torchao's config classes, or a name of 2024: {known}; got {name!r:.80}"


def check_fields(kind: str, fields: Mapping[str, Any], label: str) -> None:
    """Raise ValueError naming the field whose value no layer can have."""
    for name, allowed in _CHOICES.items():
        if name in fields and fields[name] is not None and word(fields[name]) not in allowed:
            raise ValueError(f"{label}.{name} must be one of {', '.join(allowed)}, got {fields[name]!r:.80}")
    for name in ("weight_dtype", "activation_dtype"):
        if name in fields and word(fields[name]) not in _DTYPES[kind]:
            raise ValueError(f"{label}.{name} must be one of {', '.join(_DTYPES[kind])}, got {fields[name]!r:.80}")
    for name, value in granularities(fields):
        granularity(value, f"{label}.{name}")
    if kind == INT4 and (type(fields["group_size"]) is not int or fields["group_size"] not in _GROUP_SIZES):
        raise ValueError(f"{label}.group_size must be one of {_GROUP_SIZES}, got {fields['group_size']!r:.80}")
    if kind == INT4 and fields["int4_tile_packed_ntile"] not in (8, 16):
        raise ValueError(
            f"{label}.int4_tile_packed_ntile must be 8 or 16, got {fields['int4_tile_packed_ntile']!r:.80}"
        )
    if kind == INT4 and word(fields["int4_choose_qparams_algorithm"]) == "hqq":
        packing = word(fields["int4_packing_format"])
        if packing != "tile_packed_to_4d":
            raise ValueError(f"{label}: hqq is for the packing format tile_packed_to_4d alone, got {packing}")
    if kind == MX_ROUNDED and (type(fields["block_size"]) is not int or fields["block_size"] < 1):
        raise ValueError(f"{label}.block_size must be a positive integer, got {fields['block_size']!r:.80}")
    if kind == INT8 and fields["group_size"] is not None:
        raise ValueError(
            f"{label}.group_size must be null; give a granularity of PerGroup, got {fields['group_size']!r:.80}"
        )


def granularities(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The granularities among the fields of a config, by field."""
    for name in ("granularity", "weight_granularity"):
        if name in fields:
            value = fields[name]
            yield from ((name, each) for each in (value if isinstance(value, list) else [value]))


def pair(value: Any) -> tuple[Any, Any]:
    """The granularities of activations and weights, of which a config may give one for both."""
    return (value[0], value[1]) if isinstance(value, list) else (value, value)


def _rounded_float8(fields: Mapping[str, Any], label: str) -> dict[str, Any]:
    """What torchao makes of one granularity, or none, and no mm_config."""
    value = fields["granularity"]
    both = [described("PerTensor", {})] * 2 if value is None else value if isinstance(value, list) else [value, value]
    if len(both) != 2:
        raise ValueError(f"{label}.granularity must be one, or two in a list, got {len(both)}")
    return {"granularity": both, "mm_config": fields["mm_config"] or _FAST}


def _read_names(data: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Configs by name, which are stored under a new and an old key alike."""
    new, old = data.get("fqn_to_config") or {}, data.get("module_fqn_to_config") or {}
    for key, value in (("fqn_to_config", new), ("module_fqn_to_config", old)):
        if not isinstance(value, Mapping):
            raise ValueError(f"{label}.{key} must be an object of names and configs, got {value!r:.80}")
    if new and old and new != old:
        raise ValueError(f"{label}: fqn_to_config and module_fqn_to_config are one setting, but differ; leave one out")
    from quantcore.sdk import patterns

    found = {}
    for name, value in (new or old).items():
        if name.startswith("re:"):
            patterns.check(name.removeprefix("re:"), f"{label}[{name!r:.60}]")
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{label}[{name!r:.60}] must be a config or null, got {value!r:.80}")
        found[name] = None if value is None else _written(*read_kind(value, f"{label}[{name!r:.60}]"))
    return {"fqn_to_config": found, "module_fqn_to_config": dict(found)}


def _written(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return described(kind, fields, KINDS[kind].version)


# Version 1


def _of_version_1(kind: str, data: dict[str, Any], label: str) -> dict[str, Any]:
    """The fields of version 1 in those of version 2."""
    layout = data.get("layout")
    name = layout["_type"] if isinstance(layout, Mapping) and is_object(layout) else layout
    known = _INT4_LAYOUTS if kind == INT4 else _PLAIN_LAYOUTS
    if name is not None and (not isinstance(name, str) or name not in known):
        raise ValueError(f"{label}: the layout {name!r:.60} of {kind} is not supported; known are {', '.join(known)}")
    kept = {key: value for key, value in data.items() if key not in _OLD_FIELDS}
    return _UPGRADES[kind](kept, data, name) if kind in _UPGRADES else kept


def _int4_of_version_1(kept: dict[str, Any], data: Mapping[str, Any], layout: str | None) -> dict[str, Any]:
    algorithm = "HQQ" if data.get("use_hqq") else "TINYGEMM"
    packing = "TILE_PACKED_TO_4D" if data.get("use_hqq") else _INT4_LAYOUTS[layout or "TensorCoreTiledLayout"]
    made = {
        "int4_packing_format": member("Int4PackingFormat", packing),
        "int4_choose_qparams_algorithm": member("Int4ChooseQParamsAlgorithm", algorithm),
    }
    return {**made, **kept}


def _int8_of_version_1(kept: dict[str, Any], data: Mapping[str, Any], layout: str | None) -> dict[str, Any]:
    size = kept.pop("group_size", None)
    return {"granularity": _ROW if size is None else described("PerGroup", {"group_size": size}), **kept}


def _of_int8_int4(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a class that torchao removed, in those of the one that took its place."""
    return {
        "weight_dtype": dtype_word("int4"),
        "weight_granularity": described("PerGroup", {"group_size": data.get("group_size", 32)}),
        "weight_mapping_type": data.get("mapping_type", _SYMMETRIC),
        "act_mapping_type": data.get("act_mapping_type", _ASYMMETRIC),
    }


_UPGRADES: dict[str, Callable[[dict[str, Any], Mapping[str, Any], str | None], dict[str, Any]]] = {
    INT4: _int4_of_version_1,
    INT8: _int8_of_version_1,
}
