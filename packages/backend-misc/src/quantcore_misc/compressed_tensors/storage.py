"""From a scheme of the config to the weight format that stores it."""

from __future__ import annotations

import dataclasses

from quantcore.sdk import Activation, dtype_name
from quantcore_misc.compressed_tensors.marlin24 import Marlin24Weight
from quantcore_misc.compressed_tensors.packed import PackedWeight, SmallFloatWeight
from quantcore_misc.compressed_tensors.plain import FakeWeight, FloatWeight, IntegerWeight
from quantcore_misc.compressed_tensors.scaling import Scaling
from quantcore_misc.compressed_tensors.schemes import QuantizationArgs, Scheme
from quantcore_misc.compressed_tensors.sparse import SparseWeight
from quantcore_misc.compressed_tensors.weight import CompressedWeight

_MINIFLOATS = {4: "e2m1", 6: "e2m3", 8: "e4m3"}
_KINDS: dict[str, type[CompressedWeight]] = {
    "dense": FakeWeight,
    "int-quantized": IntegerWeight,
    "float-quantized": FloatWeight,
    "mxfp8-quantized": FloatWeight,
    "nvfp4-pack-quantized": SmallFloatWeight,
    "mxfp4-pack-quantized": SmallFloatWeight,
    "mxfp6-pack-quantized": SmallFloatWeight,
    "pack-quantized": PackedWeight,
    "marlin-24": Marlin24Weight,
}


def weight_format(
    scheme: Scheme, storage: str | None, dtype: str, *, version: str | None = None, sparsity: str | None = None
) -> CompressedWeight:
    """The format of a module under a scheme.

    storage: a name of compressed-tensors, None for the one that its writers choose. dtype: of the float weight.
    version: of the file. sparsity: the sparse format that takes the place of a plain weight.
    """
    assert scheme.weights is not None
    storage = scheme.storage if storage in (None, "mixed-precision") else storage
    if storage == "naive-quantized":
        storage = "int-quantized" if scheme.weights.type == "int" else "float-quantized"
    kind = _KINDS[storage or "dense"]
    found = kind(
        scaling=scaling_of(scheme.weights),
        dtype="float16" if kind is Marlin24Weight else dtype,
        input=None if scheme.input_activations is None else activation_of(scheme.input_activations),
        output=None if scheme.output_activations is None else activation_of(scheme.output_activations),
        has_zero=not scheme.weights.symmetric,
    )
    if isinstance(found, PackedWeight):
        return found.replace(
            version=version,
            has_index=scheme.weights.actorder == "group",
            plain_zero=scheme.weights.strategy == "tensor",
        )  # type: ignore[return-value]
    return _sparse_format(found, sparsity) if sparsity is not None and kind in (FloatWeight, IntegerWeight) else found


def _sparse_format(plain: CompressedWeight, sparsity: str) -> SparseWeight:
    """The format that stores the codes of a plain one sparsely."""
    return SparseWeight(
        scaling=plain.scaling,
        dtype=plain.dtype,
        input=plain.input,
        output=plain.output,
        has_zero=plain.has_zero,
        value_dtype=None if plain.scaling is None else dtype_name(plain.scaling.code_dtype),
        is_structured=sparsity == "sparse-24-bitmask",
    )


def scaling_of(args: QuantizationArgs) -> Scaling:
    """The arithmetic of a weight's arguments."""
    element = f"int{args.num_bits}" if args.type == "int" else _MINIFLOATS[args.num_bits]
    rows, columns = args.block_structure or (1, args.group_size or 0)
    if args.strategy == "tensor":
        rows = columns = 0
    scales = "nvfp4" if args.is_nvfp4 else "e8m0" if args.is_mx else "float"
    return Scaling(element, rows, columns, args.symmetric, scales)


def activation_of(args: QuantizationArgs) -> Activation:
    """The rounding of activations by their arguments. Raises ValueError for strategies that activations have not."""
    strategy = "group" if args.strategy == "tensor_group" else args.strategy
    if strategy not in ("tensor", "token", "group"):
        raise ValueError(f"activations cannot be quantized by {strategy!r}; use tensor, token or group")
    if args.dynamic is False and strategy != "tensor":
        raise ValueError(f"static activations are quantized by tensor, not by {strategy!r}; make them dynamic")
    element = f"int{args.num_bits}" if args.type == "int" else _MINIFLOATS[args.num_bits]
    scale = "input"
    if args.is_mx:
        scale = "e8m0-even_fp4" if element == "e4m3" else "e8m0-even"
    return Activation(
        element=element,
        strategy=strategy,
        group_size=args.group_size or 0,
        is_static=args.dynamic is False,
        is_symmetric=args.symmetric,
        scale="e4m3" if args.is_nvfp4 else scale,
        outer="divide" if args.is_nvfp4 else None,
        scale_math="input",
        code_math="float32" if args.is_nvfp4 else "input",
    )


def cache_rounding(args: QuantizationArgs) -> Activation:
    """The rounding of keys and values, under one scale or one for each head. Raises ValueError for other strategies."""
    if args.strategy not in ("tensor", "attn_head"):
        raise ValueError(f"kv_cache_scheme: strategy {args.strategy!r} is not one of tensor and attn_head")
    return activation_of(dataclasses.replace(args, strategy="tensor"))
