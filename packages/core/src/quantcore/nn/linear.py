"""A linear layer over a quantized weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantcore.errors import CheckpointError
from quantcore.formats.base import WeightFormat, describe
from quantcore.kernels import ops
from quantcore.nn.dense import DenseLinear, build_dense, check_finite, view_dense
from quantcore.nn.held import stored_tensors
from quantcore.nn.module import QuantizedModule
from quantcore.plugins.manager import plugins


class QuantizedLinear(QuantizedModule):
    """y = x @ W.T + bias with W [out_features, in_features] stored in a weight format.

    x: [..., in_features], fp32, bf16 or fp16; y has its leading shape and dtype. Differentiable in x and bias.
    """

    def __init__(
        self,
        weight_format: WeightFormat,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        *,
        in_features: int,
        out_features: int,
        name: str = "",
        dense_type: type[nn.Module] = nn.Linear,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight_format, tensors, (out_features, in_features), name, dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.dense_type = dense_type  # what `to_dense` gives back
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        config_or_format: Any,
        *,
        name: str = "",
        calibration: Any = None,
    ) -> QuantizedLinear:
        """The quantized form of an nn.Linear, or of transformers' Conv1D, whose [K, N] weight is transposed.

        config_or_format: a WeightFormat, a config, or a dict as found in config.json. calibration: inputs of the layer
        [..., K], or an iterable of those, for the config of a method that calibrates; without them such a method
        rounds. linear is not changed.
        Raises TypeError for other modules, ValueError naming the layer for a weight that holds NaN or inf, has no
        elements, or does not fit the format.
        """
        dense = _dense(linear, name)
        check_finite(dense.weight, name)
        if calibration is not None:
            return _calibrated(linear, config_or_format, name, calibration)
        weight_format = resolve_format(config_or_format, name, linear, stored=False)
        try:
            weight_format.check_shape(dense.shape)
        except ValueError as error:
            raise ValueError(f"{name or 'layer'}: {error}") from error
        tensors = stored_tensors(weight_format, dense.weight, name)
        bias = None if dense.bias is None else dense.bias.clone()
        return cls._build(weight_format, tensors, bias, dense, name, dense.weight.dtype)

    @classmethod
    def from_tensors(
        cls,
        config_or_format: Any,
        tensors: Mapping[str, Tensor],
        *,
        in_features: int,
        out_features: int,
        name: str = "",
        dtype: torch.dtype | None = None,
    ) -> QuantizedLinear:
        """A layer of stored tensors as a checkpoint holds them; keys are suffixes such as "weight.absmax" and "bias".

        dtype: of the weight, dequantized; None takes the one that the format gives.
        Raises CheckpointError listing every missing, surplus, wrong-shape and wrong-dtype tensor.
        """
        with torch.device("meta"):
            linear = nn.Linear(in_features, out_features, bias="bias" in tensors)
        weight_format = resolve_format(config_or_format, name, linear, stored=True)
        return cls.from_stored(weight_format, tensors, _dense(linear, name), name, dtype)

    @classmethod
    def from_stored(
        cls,
        weight_format: WeightFormat,
        tensors: Mapping[str, Tensor],
        dense: DenseLinear,
        name: str,
        dtype: torch.dtype | None = None,
    ) -> QuantizedLinear:
        """A layer of stored tensors in place of a dense one, which gives shape and kind; "bias" may be among them.

        dtype: of the weight, dequantized; None takes the one that the format gives.
        """
        tensors = dict(tensors)
        bias = tensors.pop("bias", None)
        fault = _bias_fault(bias, dense)
        if fault is None:
            return cls._build(weight_format, tensors, bias, dense, name, dtype)
        try:
            cls._build(weight_format, tensors, None, dense, name, dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {fault}") from error
        raise CheckpointError(f"{name or 'layer'}: {fault}")

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x times the weight, plus a bias [out_features]. Raises as `forward` for an input that does not fit."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"{self._label()}: expected input [..., {self.in_features}], got {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{self._label()}: expected a float input, got {x.dtype}")
        y: Tensor = ops.linear(x, self.operands, bias, self._format_key, self.out_features)
        return y

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The layer with a float weight again, in dtype (None: its own), of the kind it was quantized from."""
        weight = self.dequantize(dtype)
        return build_dense(self.dense_type, weight, None if self.bias is None else self.bias.to(weight.dtype))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format!r}"
        )

    @classmethod
    def _build(
        cls,
        weight_format: WeightFormat,
        tensors: Mapping[str, Tensor],
        bias: Tensor | None,
        dense: DenseLinear,
        name: str,
        dtype: torch.dtype | None,
    ) -> QuantizedLinear:
        out_features, in_features = dense.shape
        return cls(
            weight_format,
            tensors,
            bias,
            in_features=in_features,
            out_features=out_features,
            name=name,
            dense_type=dense.kind,
            dtype=dtype,
        )


def resolve_format(config_or_format: Any, name: str, module: nn.Module, *, stored: bool) -> WeightFormat:
    """The format of one module by a format, a config, or a dict as found in config.json.

    stored: whether the module's tensors are stored already, and may describe a format that the config does not give.
    """
    if isinstance(config_or_format, WeightFormat):
        return config_or_format
    found: WeightFormat | None = plugins().hook.quantcore_layer_format(
        config=config_or_format, name=name, module=module, stored=stored
    )
    assert found is not None  # the quantizers answer, or raise
    return found


def _calibrated(linear: nn.Module, config_or_format: Any, name: str, inputs: Any) -> QuantizedLinear:
    if isinstance(config_or_format, WeightFormat):
        kind = type(config_or_format).__name__
        raise ValueError(f"{name or 'layer'}: the format {kind} takes no calibration data; leave it out")
    layer = plugins().hook.quantcore_calibrated_layer(config=config_or_format, name=name, module=linear, inputs=inputs)
    assert isinstance(layer, QuantizedLinear)  # the quantizers answer, or raise
    return layer


def _dense(module: nn.Module, name: str) -> DenseLinear:
    dense = view_dense(module)
    if dense is None:
        raise TypeError(f"{name or 'layer'}: expected nn.Linear or Conv1D, got {type(module).__name__}")
    return dense


def _bias_fault(bias: Tensor | None, dense: DenseLinear) -> str | None:
    if bias is None:
        return None if dense.bias is None else f"bias: missing, expected {describe(dense.bias.dtype, dense.bias.shape)}"
    if dense.bias is None:
        return "bias: surplus, the layer has none"
    if bias.is_floating_point() and bias.shape == dense.bias.shape:
        return None
    return f"bias: expected {describe(dense.bias.dtype, dense.bias.shape)}, got {describe(bias.dtype, bias.shape)}"
