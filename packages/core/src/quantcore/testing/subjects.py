"""What the conformance suite runs on: example configs, the layers and formats they give, and a small model."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import quantcore
from quantcore.formats.base import WeightFormat
from quantcore.formats.quantized_weight import QuantizedWeight
from quantcore.nn.module import QuantizedModule
from quantcore.plugins.backend import Backend
from quantcore.quantization_config import QuantizationConfigMixin
from quantcore.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig
from quantcore.quantizers.weight import WeightQuantizer

LAYER_NAME = "model.layers.0.self_attn.q_proj"
REGULAR_SHAPE = (128, 256)  # fits every published group and block size, and is large enough to measure an error on
KEPT = 12  # layers that an example keeps, 50 kB each; three dtypes and some seeds come again and again
Made = TypeVar("Made", QuantizedWeight, QuantizedModule)


@dataclass(frozen=True, eq=False)
class Example:
    """One declared example config of a method, with what was made of it: tests get copies."""

    backend: Backend
    config_dict: Mapping[str, Any]
    _stored: dict[str, QuantizedWeight] = field(default_factory=dict, init=False, repr=False)
    _layers: dict[str, QuantizedModule] = field(default_factory=dict, init=False, repr=False)

    def config(self) -> QuantizationConfigMixin:
        return AutoQuantizationConfig.from_dict(self.config_dict)

    def quantizer(self) -> WeightQuantizer:
        """The quantizer of the config, for float weights where the method needs no calibration data."""
        quantizer = AutoHfQuantizer.from_config(self.config(), pre_quantized=self.backend.needs_calibration)
        assert isinstance(quantizer, WeightQuantizer), f"{type(quantizer).__name__} is no WeightQuantizer"
        return quantizer

    def weight_format(self, linear: nn.Module) -> WeightFormat:
        """The format that the config gives a linear layer."""
        weight_format = self.quantizer().format_for(LAYER_NAME, linear)
        assert weight_format is not None, f"the example config leaves {LAYER_NAME} float; use one that quantizes it"
        return weight_format

    @property
    def code_bits(self) -> float:
        """Bits a weight of the codes: what the format or its family says, else those of the largest tensor."""
        stored = self.quantize(make_linear())
        if stored.format.code_bits is not None:
            return stored.format.code_bits
        if stored.format.family is not None:
            return stored.format.untransformed().lower(stored.tensors, stored.shape).bits
        return 8 * max(tensor.nbytes for tensor in stored.tensors.values()) / math.prod(stored.shape)

    def quantize(self, linear: nn.Linear) -> QuantizedWeight:
        """The layer's weight, stored."""
        return _copy_of_one(self._stored, linear, self.quantize_anew)

    def quantize_anew(self, linear: nn.Linear) -> QuantizedWeight:
        """As `quantize`, whatever was made before."""
        weight = linear.weight.detach()
        weight_format = self.weight_format(linear)
        return QuantizedWeight(weight_format, weight_format.quantize(weight), tuple(weight.shape))

    def quantize_model(self, model: nn.Module) -> nn.Module:
        """The model, quantized in place.

        Where the method needs calibration data, its format rounds in place of the solver: what is stored is worse, and
        all that is done with it the same.
        """
        if not self.backend.needs_calibration:
            return quantcore.quantize(model, dict(self.config_dict))
        return self.quantizer().quantize_model(model)

    def layer(self, linear: nn.Linear) -> QuantizedModule:
        """The module that stands in a quantized model in place of a linear layer of the name LAYER_NAME."""
        return _copy_of_one(self._layers, linear, self.make_layer)

    def make_layer(self, linear: nn.Linear) -> QuantizedModule:
        """As `layer`, whatever was made before."""
        model = self.quantize_model(_wrap(linear))
        layer = model.get_submodule(LAYER_NAME)
        assert isinstance(layer, QuantizedModule), f"a quantized layer is a {type(layer).__name__}"
        return layer


def make_linear(
    shape: tuple[int, int] = REGULAR_SHAPE,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    bias: bool = True,
) -> nn.Linear:
    """A linear layer with a normal weight [N, K] of deviation 0.02, the same for the same seed on every device."""
    out_features, in_features = shape
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype, device=device)
    linear.weight.data = 0.02 * normal(shape, seed=seed).to(device, dtype)
    if bias:
        linear.bias.data = normal((out_features,), seed=seed + 1).to(device, dtype)
    return linear


def linear_of(weight: Tensor) -> nn.Linear:
    """A linear layer over the given weight [N, K]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def normal(shape: tuple[int, ...], *, seed: int = 0) -> Tensor:
    """Standard normal float32 values, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _copy_of_one(made: dict[str, Made], linear: nn.Linear, make: Callable[[nn.Linear], Made]) -> Made:
    """A copy of what was made of a layer of this content, which is made where it is not among the last ones."""
    key = _content(linear)
    if key not in made:
        made[key] = make(linear)
        if len(made) > KEPT:
            del made[next(iter(made))]
    return copy.deepcopy(made[key])


def _content(linear: nn.Linear) -> str:
    """A text that two linear layers share when dtype, device, layout and bytes of their tensors are equal."""
    digest = hashlib.blake2b()
    for name, tensor in linear.state_dict().items():
        layout = (name, tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride())
        digest.update(repr(layout).encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _wrap(linear: nn.Linear) -> nn.Module:
    """A model that holds the layer under LAYER_NAME."""
    module: nn.Module = linear
    for part in reversed(LAYER_NAME.split(".")):
        parent = nn.Module()
        parent.add_module(part, module)
        module = parent
    return module
