"""The formats of torchao's tensor subclasses, by the attributes with which the header of a file describes each.

Source: torchao 0.18, quantization/quantize_/workflows and prototype/mx_formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quantcore.sdk import Activation, dtype_name, float_dtype
from quantcore_misc.torchao.format import (
    Block,
    TorchAoWeight,
    float8_format,
    int4_format,
    int4_words_format,
    int8_format,
    intx_format,
)
from quantcore_misc.torchao.microscaled import (
    MX_ELEMENTS,
    NVFP4_BLOCK,
    mx_format,
    mx_rounding,
    nvfp4_format,
    nvfp4_rounding,
)
from quantcore_misc.torchao.rounding import INTX_ROUNDING, float8_rounding, int8_rounding
from quantcore_misc.torchao.tinygemm import tiled_format
from quantcore_misc.torchao.words import (
    MOST_COLUMNS,
    Granularity,
    granularity,
    word,
)

TOKEN_INTEGERS = "int8_asym_per_token"
_ROUNDED_BY = {"PerTensor": "tensor", "PerRow": "token", "PerGroup": "group", "PerBlock": "group"}


def format_of(entry: Mapping[str, Any], shape: tuple[int, ...], label: str) -> TorchAoWeight:
    """The format that an entry describes for a weight of this shape.

    Raises ValueError naming label for a class that is not supported, and for attributes that no such class has.
    """
    reader = _READERS.get(entry["_type"])
    if reader is None:
        raise ValueError(
            f"{label}: is stored as {entry['_type']!r:.60}, which is not supported; known are {', '.join(_READERS)}"
        )
    try:
        return reader(entry["_data"], shape)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"{label}: {entry['_type']} is described wrongly in the header: {error!r:.80}") from error


def _block(data: Mapping[str, Any], shape: tuple[int, ...]) -> Block:
    """Rows and columns that share a scale, 0 for all of a weight of this shape."""
    rows, columns = data["block_size"]
    if type(rows) is not int or type(columns) is not int or rows < 1 or columns < 1:
        raise TypeError(f"block_size {data['block_size']!r:.60}")
    if columns != shape[1]:
        return rows, columns
    return (0, 0) if rows == shape[0] and rows != 1 else (rows, 0)


def _group_size(data: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    rows, columns = data["block_size"]
    if rows != 1 or type(columns) is not int or columns < 1:
        raise TypeError(f"block_size {data['block_size']!r:.60}")
    return columns


def _dtype(data: Mapping[str, Any]) -> str:
    return word(data["dtype"])


def _read_int8(data: Mapping[str, Any], shape: tuple[int, ...]) -> TorchAoWeight:
    half = bool(data.get("reduce_range"))
    return int8_format(_block(data, shape), _dtype(data), _int8_rounding(data.get("act_quant_kwargs")), half_range=half)


def _int8_rounding(kwargs: Any) -> Activation | None:
    if kwargs is None:
        return None
    data = kwargs["_data"]
    strategy = _ROUNDED_BY[granularity(data["granularity"], "act_quant_kwargs.granularity").kind]
    symmetric = word(data.get("mapping_type", "SYMMETRIC")) == "symmetric"
    return int8_rounding(strategy, is_symmetric=symmetric, half_range=bool(data.get("reduce_range")))


def _read_float8(data: Mapping[str, Any], shape: tuple[int, ...]) -> TorchAoWeight:
    kwargs = data.get("act_quant_kwargs")
    rounding = None if kwargs is None else _float8_rounding(kwargs["_data"])
    return float8_format(_block(data, shape), _dtype(data), "float8_e4m3fn", rounding)


def _float8_rounding(data: Mapping[str, Any]) -> Activation:
    found = granularity(data["granularity"], "act_quant_kwargs.granularity")
    bounds = data.get("hp_value_lb"), data.get("hp_value_ub")
    return rounding_of_float8(found, word(data.get("float8_dtype", "float8_e4m3fn")), *bounds)


def rounding_of_float8(found: Granularity, dtype: str, low: float | None, high: float | None) -> Activation:
    """How float8 layers round their input."""
    size = found.columns if found.kind in ("PerGroup", "PerBlock") else 0
    return float8_rounding(_ROUNDED_BY[found.kind], size, dtype, low, high)


def _read_intx(data: Mapping[str, Any], shape: tuple[int, ...]) -> TorchAoWeight:
    kind = data.get("activation_quantization")
    if kind not in (None, TOKEN_INTEGERS):
        raise TypeError(f"activation_quantization {kind!r:.60}")
    bits = int(word(data["target_dtype"]).removeprefix("int"))
    return intx_format(bits, _block(data, shape), _dtype(data), INTX_ROUNDING if kind else None)


def _read_int4(data: Mapping[str, Any], shape: tuple[int, ...]) -> TorchAoWeight:
    return int4_format(_group_size(data, shape), "bfloat16")


def _read_words(data: Mapping[str, Any], shape: tuple[int, ...]) -> TorchAoWeight:
    return int4_words_format(_group_size(data, shape), "bfloat16")


def _read_tiles(data: Mapping[str, Any], shape: tuple[int, ...]) -> TorchAoWeight:
    return tiled_format(_group_size(data, shape))


def _float_word(value: Any) -> str:
    return dtype_name(float_dtype(word(value), "orig_dtype"))


def _read_nvfp4(data: Mapping[str, Any], shape: tuple[int, ...]) -> TorchAoWeight:
    if data["block_size"] != NVFP4_BLOCK:
        raise TypeError(f"block_size {data['block_size']!r:.60}")
    kwargs = data.get("act_quant_kwargs")
    rounding = None
    if kwargs is not None:
        rounding = nvfp4_rounding(measures_outer=bool(kwargs["_data"].get("use_dynamic_per_tensor_scale")))
    return nvfp4_format(_float_word(data["orig_dtype"]), rounding, is_tiled=bool(data.get("is_swizzled_scales")))


def _read_mx(data: Mapping[str, Any], shape: tuple[int, ...]) -> TorchAoWeight:
    kwargs, mode, rounding = data.get("act_quant_kwargs"), "rceil", None
    if kwargs is not None:
        own = kwargs["_data"]
        mode = word(own.get("scaling_mode", "FLOOR"))
        rounding = mx_rounding(_mx_element(own), _size(own), mode)
    is_tiled = bool(data.get("is_swizzled_scales"))
    return mx_format(_float_word(data["orig_dtype"]), _mx_element(data), _size(data), mode, rounding, is_tiled=is_tiled)


def _mx_element(data: Mapping[str, Any]) -> str:
    name = word(data["elem_dtype"])
    if name not in MX_ELEMENTS:
        raise TypeError(f"elem_dtype {data['elem_dtype']!r:.60}")
    return name


def _size(data: Mapping[str, Any]) -> int:
    size = data["block_size"]
    if type(size) is not int or not 0 < size <= MOST_COLUMNS:
        raise TypeError(f"block_size {size!r:.60}")
    return size


_READERS: dict[str, Callable[[Mapping[str, Any], tuple[int, ...]], TorchAoWeight]] = {
    "Int8Tensor": _read_int8,
    "Float8Tensor": _read_float8,
    "IntxUnpackedToInt8Tensor": _read_intx,
    "Int4Tensor": _read_int4,
    "Int4PlainInt32Tensor": _read_words,
    "Int4TilePackedTo4dTensor": _read_tiles,
    "NVFP4Tensor": _read_nvfp4,
    "MXTensor": _read_mx,
}
