"""Weights that torchao until 0.13 stored as pickled objects, in the tensors of today's files.

Source: torchao 0.13, dtypes/affine_quantized_tensor.py, dtypes/uintx.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantcore.sdk import Pickled
from quantcore_misc.torchao.format import CODES, SCALE, ZERO
from quantcore_misc.torchao.tinygemm import SCALE_AND_ZERO

_INTEGER_ZEROS = 1  # the member of ZeroPointDomain
_TILE_WORDS = 4  # of a lane, for tiles of 128 columns
_WHOLE_BYTE = ((None, None), (-128, 127))


def stored_tensors(name: str, value: Pickled) -> dict[str, Tensor]:
    """The stored tensors of a parameter by their names. Raises ValueError for a class or layout that is not read."""
    kind, state = value.kind.rpartition(".")[2], value.state
    if kind == "LinearActivationQuantizedTensor":  # how it rounds its input, the config says too
        return stored_tensors(name, state["original_weight_tensor"])
    impl = state.get("tensor_impl")
    if kind != "AffineQuantizedTensor" or not isinstance(impl, Pickled):
        raise ValueError("only AffineQuantizedTensor is, by itself or under LinearActivationQuantizedTensor")
    layout = impl.kind.rpartition(".")[2]
    owner, _, parameter = name.rpartition(".")
    if parameter != "weight" or layout not in _LAYOUTS:
        raise ValueError(f"{layout} of {parameter} is none of weights in {', '.join(_LAYOUTS)}")
    tensors = _LAYOUTS[layout](state, impl.state, tuple(value.args[1]))
    return {f"{owner}.{suffix}" if owner else suffix: tensor for suffix, tensor in tensors.items()}


def _plain(state: Mapping[str, Any], impl: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Integers a byte each; scales of whole bytes are float32 today, others of the weight's dtype."""
    domain = state.get("zero_point_domain")
    if isinstance(domain, Pickled) and domain.args != (_INTEGER_ZEROS,):
        raise ValueError("its zero points are floats")
    codes, scale = impl["int_data"].read(), impl["scale"].read()
    grid = tuple(size // own for size, own in zip(shape, state["block_size"], strict=True))
    if codes.dtype != torch.int8 or tuple(codes.shape) != shape or len(shape) != 2:
        raise ValueError(f"its codes are {codes.dtype} {list(codes.shape)}, not int8 {list(shape)}")
    zero = torch.zeros(grid, dtype=torch.int8) if impl.get("zero_point") is None else impl["zero_point"].read()
    if (zero.long() != zero.to(torch.int8)).any():
        raise ValueError("its zero points do not fit int8")
    is_whole = (state.get("quant_min"), state.get("quant_max")) in _WHOLE_BYTE
    numbers = scale.float() if is_whole else scale
    return {CODES: codes, SCALE: numbers.reshape(grid), ZERO: zero.to(torch.int8).reshape(grid)}


def _tiled(state: Mapping[str, Any], impl: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Tensor]:
    words, both = impl["packed_weight"].read(), impl["scale_and_zero"].read()
    if words.dtype != torch.int32 or words.ndim != 4 or words.shape[3] != _TILE_WORDS:
        raise ValueError(f"its tiles are {words.dtype} {list(words.shape)}; those of inner_k_tiles 8 are read")
    return {CODES: words, SCALE_AND_ZERO: both}


_LAYOUTS = {"PlainAQTTensorImpl": _plain, "TensorCoreTiledAQTTensorImpl": _tiled}
