"""The quantizer of methods that train over float weights, which each forward quantizes anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantcore.nn.online import OnlineLinear
from quantcore.nn.replace import replace_module
from quantcore.quantizers.weight import WeightQuantizer

if TYPE_CHECKING:
    from quantcore.checkpoints.read import Checkpoint


class OnlineQuantizer(WeightQuantizer):
    """A quantizer whose layers keep their float weights, which are trained, and saved as they are.

    Subclasses define `format_for`, by which a layer rounds. Parts of fused experts are no modules, and stay float.
    """

    def online_layer(self, name: str, linear: nn.Linear) -> OnlineLinear:
        """The layer in place of a float one, over its parameters."""
        weight_format = self.format_for(name, linear)
        assert weight_format is not None, f"{name}: was planned, so it has a format"
        return OnlineLinear(linear, weight_format)

    def quantize_model(self, model: nn.Module) -> nn.Module:
        """Let the planned linear layers round their weights as they run; nothing is copied."""
        self._round_as_they_run(model)
        self.preprocess_model(model)
        return self.postprocess_model(model)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint: Checkpoint | None = None, **kwargs: Any
    ) -> None:
        super()._process_model_before_weight_loading(model, checkpoint=checkpoint, **kwargs)
        if checkpoint is not None:
            self._round_as_they_run(model)

    def _round_as_they_run(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        for planned in self.plan(model).layers:
            module = modules.get(planned.name)
            if type(module) is nn.Linear:
                replace_module(model, planned.name, self.online_layer(planned.name, module).train(module.training))

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, OnlineLinear):
                replace_module(model, name, module.to_linear().to(dtype))
        return model
