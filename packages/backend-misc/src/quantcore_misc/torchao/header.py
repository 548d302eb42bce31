"""What the header of a file says of its tensors, by which torchao makes tensor subclasses of them, and back.

Each tensor subclass has an entry under the name of its parameter: {"_type": class, "_data": attributes,
"_tensor_data_names": parts}, plain tensors {"_type": "Tensor"}; "tensor_names" lists all of them. Source: torchao 0.18,
prototype/safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from quantcore.sdk import Float, Integer, StoredLayer
from quantcore_misc.torchao import kinds
from quantcore_misc.torchao.config import QuantType
from quantcore_misc.torchao.format import (
    Float8Weight,
    Int4Weight,
    Int8Weight,
    IntxWeight,
    TorchAoWeight,
)
from quantcore_misc.torchao.microscaled import (
    MX_ELEMENTS,
    NVFP4_BLOCK,
    MxWeight,
    NvFp4Input,
    NvFp4Weight,
)
from quantcore_misc.torchao.readers import TOKEN_INTEGERS
from quantcore_misc.torchao.tinygemm import TiledInt4
from quantcore_misc.torchao.words import (
    described,
    dtype_word,
    member,
    unversioned,
)

NAMES = "tensor_names"
_PLAIN = json.dumps({"_type": "Tensor"})
_PARTS = "_weight_"  # before the name of a part
# Parts that stand first among those of their class.
_OPTIONAL = {
    "Int8Tensor": ("zero_point", "act_quant_scale", "act_quant_zero_point", "act_pre_scale"),
    "Int4Tensor": ("act_pre_scale",),
    "Int4TilePackedTo4dTensor": ("act_pre_scale",),
    "Int4PlainInt32Tensor": ("act_pre_scale",),
    "NVFP4Tensor": ("per_tensor_scale", "act_per_tensor_scale"),
}
_NVFP4_INPUT, _MX_INPUT = "QuantizeTensorToNVFP4Kwargs", "QuantizeTensorToMXKwargs"


def read_entry(text: str, label: str) -> dict[str, Any] | None:
    """The entry of a tensor subclass, None for that of a plain tensor, or for what is no entry.

    Raises ValueError naming label for an entry that lacks a part.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or "_type" not in found or found["_type"] == "Tensor":
        return None
    if not isinstance(found.get("_data"), dict) or not isinstance(found["_type"], str):
        raise ValueError(f"{label}: the header of the file says {text:.100}, which is no description of a tensor")
    return found


def entries(metadata: Mapping[str, str], label: str) -> dict[str, dict[str, Any]]:
    """The entries of tensor subclasses in a header, by the names of their parameters; {} where it is not torchao's."""
    if NAMES not in metadata:
        return {}
    found = {name: read_entry(text, f"{label}: {name}") for name, text in metadata.items() if name != NAMES}
    return {name: entry for name, entry in found.items() if entry is not None}


def shape_of(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """The shape of the weight, where an entry says it."""
    shape = entry["_data"].get("shape")
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size >= 0 for size in shape)
    return (shape[0], shape[1]) if is_shape else None


# Writing


def made_entry(layer: StoredLayer, config: QuantType | None) -> dict[str, Any]:
    """The entry of a layer that was quantized by a config, or is stored so."""
    stored, shape = layer.weight_format, layer.shape
    assert isinstance(stored, TorchAoWeight)
    kind = _class_of(stored)
    data = _WRITERS[kind](stored, shape, {} if config is None else config.fields)
    return {"_type": kind, "_data": data, "_tensor_data_names": _names(kind, layer.tensors)}


def _class_of(stored: TorchAoWeight) -> str:
    if isinstance(stored, IntxWeight) and stored.layout.packing != "single":
        return "Int4PlainInt32Tensor"
    return _CLASSES[type(stored)]


_CLASSES: dict[type[TorchAoWeight], str] = {
    Int8Weight: "Int8Tensor",
    Float8Weight: "Float8Tensor",
    IntxWeight: "IntxUnpackedToInt8Tensor",
    Int4Weight: "Int4Tensor",
    TiledInt4: "Int4TilePackedTo4dTensor",
    NvFp4Weight: "NVFP4Tensor",
    MxWeight: "MXTensor",
}


def _names(kind: str, stored: Iterable[str]) -> list[str]:
    """The parts of a tensor in the order of its class."""
    parts = [suffix.removeprefix(_PARTS) for suffix in stored if suffix.startswith(_PARTS)]
    first = [name for name in _OPTIONAL.get(kind, ()) if name in parts]
    return [*first, *(name for name in parts if name not in first)]


def _written_block(stored: TorchAoWeight, shape: Sequence[int]) -> list[int]:
    return [own or size for own, size in zip(stored.block, shape, strict=True)]


def _write_int8(stored: TorchAoWeight, shape: tuple[int, ...], fields: Mapping[str, Any]) -> dict[str, Any]:
    assert isinstance(stored, Int8Weight)
    kwargs = None
    if stored.input is not None:
        given = described("PerTensor", {}) if stored.input.is_static else kinds.pair(fields.get("granularity"))[0]
        made = {
            "granularity": given or described("PerRow", {"dim": -1}),
            "mapping_type": member("MappingType", "SYMMETRIC" if stored.input.is_symmetric else "ASYMMETRIC"),
            "reduce_range": stored.half_range,
        }
        kwargs = unversioned(described("QuantizeTensorToInt8Kwargs", made))
    return {
        "act_quant_kwargs": kwargs,
        "reduce_range": stored.half_range,
        "block_size": _written_block(stored, shape),
        "dtype": dtype_word(stored.weight_dtype),
    }


def _write_float8(stored: TorchAoWeight, shape: tuple[int, ...], fields: Mapping[str, Any]) -> dict[str, Any]:
    preference = fields.get("kernel_preference", member("KernelPreference", "AUTO"))
    kwargs = None
    if stored.input is not None:
        made = {
            "float8_dtype": fields.get("activation_dtype", dtype_word("float8_e4m3fn")),
            "granularity": kinds.pair(fields.get("granularity"))[0] or described("PerRow", {"dim": -1}),
            "mm_config": None,
            "hp_value_lb": fields.get("activation_value_lb"),
            "hp_value_ub": fields.get("activation_value_ub"),
            "kernel_preference": preference,
        }
        kwargs = unversioned(described("QuantizeTensorToFloat8Kwargs", made))
    return {
        "block_size": _written_block(stored, shape),
        "mm_config": unversioned(fields.get("mm_config")),
        "act_quant_kwargs": kwargs,
        "kernel_preference": preference,
        "dtype": dtype_word(stored.weight_dtype),
    }


def _write_intx(stored: TorchAoWeight, shape: tuple[int, ...], fields: Mapping[str, Any]) -> dict[str, Any]:
    assert isinstance(stored.element, Integer)
    return {
        "target_dtype": dtype_word(f"int{stored.element.bits}"),
        "block_size": _written_block(stored, shape),
        "dtype": dtype_word(stored.weight_dtype),
        "activation_quantization": None if stored.input is None else TOKEN_INTEGERS,
    }


def _write_shape(stored: TorchAoWeight, shape: tuple[int, ...], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"block_size": [1, stored.block[1]], "shape": list(shape)}


def _write_int4(stored: TorchAoWeight, shape: tuple[int, ...], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"activation_dtype": dtype_word("bfloat16"), **_write_shape(stored, shape, fields)}


def _write_nvfp4(stored: TorchAoWeight, shape: tuple[int, ...], fields: Mapping[str, Any]) -> dict[str, Any]:
    assert isinstance(stored, NvFp4Weight)
    fused, kwargs = bool(fields.get("use_triton_kernel")), None
    if stored.input is not None:
        assert isinstance(stored.input, NvFp4Input)
        made = {
            "block_size": NVFP4_BLOCK,
            "is_swizzled_scales": True,
            "use_triton_kernel": fused,
            "use_dynamic_per_tensor_scale": stored.input.measures_outer,
        }
        kwargs = unversioned(described(_NVFP4_INPUT, made))
    return {
        "is_swizzled_scales": stored.is_tiled,
        "use_triton_kernel": fused,
        "act_quant_kwargs": kwargs,
        "block_size": NVFP4_BLOCK,
        "orig_dtype": dtype_word(stored.weight_dtype),
    }


def _write_mx(stored: TorchAoWeight, shape: tuple[int, ...], fields: Mapping[str, Any]) -> dict[str, Any]:
    assert isinstance(stored, MxWeight)
    assert isinstance(stored.element, Float)
    element = next(name for name, kind in MX_ELEMENTS.items() if kind[0] == stored.element.name)
    spelled = element if element.startswith("fp6") else dtype_word(element)
    preference = fields.get("kernel_preference", member("KernelPreference", "AUTO"))
    kwargs = None
    if stored.input is not None:
        made = {
            "elem_dtype": spelled,
            "block_size": stored.block[1],
            "scaling_mode": member("ScaleCalculationMode", stored.mode.upper()),
            "kernel_preference": preference,
            "is_swizzled_scales": True,
        }
        kwargs = unversioned(described(_MX_INPUT, made))
    return {
        "elem_dtype": spelled,
        "block_size": stored.block[1],
        "orig_dtype": dtype_word(stored.weight_dtype),
        "kernel_preference": preference,
        "act_quant_kwargs": kwargs,
        "is_swizzled_scales": stored.is_tiled,
    }


_WRITERS: dict[str, Callable[[TorchAoWeight, tuple[int, ...], Mapping[str, Any]], dict[str, Any]]] = {
    "Int8Tensor": _write_int8,
    "Float8Tensor": _write_float8,
    "IntxUnpackedToInt8Tensor": _write_intx,
    "Int4Tensor": _write_int4,
    "Int4PlainInt32Tensor": _write_shape,
    "Int4TilePackedTo4dTensor": _write_shape,
    "NVFP4Tensor": _write_nvfp4,
    "MXTensor": _write_mx,
}


def header(described_layers: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> dict[str, str]:
    """The metadata of a file's header for layers by their names, and all tensors of the checkpoint by theirs."""
    found: dict[str, str] = {}
    for name in names:
        owner, _, suffix = name.rpartition(".")
        if owner in described_layers and suffix.startswith(_PARTS):
            found[f"{owner}.weight" if owner else "weight"] = json.dumps(described_layers[owner])
        else:
            found[name] = _PLAIN
    return {**found, NAMES: json.dumps(list(found))}
