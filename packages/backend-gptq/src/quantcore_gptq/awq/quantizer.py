"""The quantizer of AWQ: channel scales for each input of a block, then limits of each group, then rounding."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantcore.sdk import CalibratedQuantizer, dtype_name, replace_module, selection
from quantcore_gptq.awq.activation import ScaledActivation
from quantcore_gptq.awq.blocks import BlockSolver, InputStatistics
from quantcore_gptq.awq.config import AwqConfig
from quantcore_gptq.awq.folding import Folds
from quantcore_gptq.awq.format import Awq, AwqMarlin
from quantcore_gptq.models import ROUTERS

if TYPE_CHECKING:
    from quantcore.sdk import Block, Calibration, Checkpoint, Plan, StoredLayer

logger = logging.getLogger(__name__)

# Models whose published readers know of divided activations.
WRAPPING_MODELS = ("bloom", "falcon", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "starcoder2")


class AwqQuantizer(CalibratedQuantizer):
    """Formats by the config; layers that the layout cannot hold stay float, and are listed as such."""

    quantization_config: AwqConfig
    leaves_misfits = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._folds: Folds | None = None
        self._misfits: tuple[str, ...] = ()

    def format_for(self, name: str, module: nn.Module) -> Awq | AwqMarlin | None:
        config = self.quantization_config
        settings = config.for_layer(name)
        if settings is None:
            return None
        dtype = dtype_name(torch.bfloat16 if module.weight.dtype == torch.bfloat16 else torch.float16)
        if config.layout == "marlin":
            return AwqMarlin(settings.group_size, dtype)
        return Awq(
            version=config.layout,
            bits=settings.bits,
            group_size=settings.group_size,
            zero_point=config.zero_point,
            scale_dtype=dtype,
            interleaved=settings.bits == 4 or (settings.bits < 8 and config.extra_keys.get("provider") == "auto-round"),
        )

    def _patterns(self, model: nn.Module) -> list[str]:
        """The user's list is added to the automatic one, as transformers does for this method alone."""
        given = super()._patterns(model)
        return [*given, *selection.default_skips(model)]

    def _reason_to_leave(
        self, name: str, patterns: list[str], tied: Mapping[str, str], head: str | None = None
    ) -> str | None:
        if name.rpartition(".")[2] in ROUTERS:
            return "it chooses experts"
        return super()._reason_to_leave(name, patterns, tied, head)

    # Quantizing

    def plan(self, model: nn.Module) -> Plan:
        plan = super().plan(model)
        self._misfits = plan.misfits
        if plan.misfits:
            logger.warning("%d layers stay float: %s", len(plan.misfits), "; ".join(plan.reasons(plan.misfits)))
        return plan

    def postprocess_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """As for every method; other readers learn from the config which layers stayed float."""
        if self._misfits:
            listed = self.quantization_config.modules_to_not_convert or []
            self.quantization_config.modules_to_not_convert = [*listed, *self._misfits]
        return super().postprocess_model(model, **kwargs)

    def prepare_calibration(self, calibration: Calibration) -> Calibration:
        return super().prepare_calibration(calibration).filled(seqlen=self.quantization_config.model_seqlen)

    def describe_calibrated(self, model: nn.Module) -> None:
        """Calibration texts do not go into the config that is saved."""
        self.quantization_config.dataset = self.quantization_config.tokenizer = None

    def solve_block(self, block: Block) -> None:
        if self._folds is None:
            model_type = getattr(getattr(block.model, "config", None), "model_type", None)
            self._folds = Folds(can_wrap=model_type in WRAPPING_MODELS)
        folds = self._folds.of(block) if block.name else []
        names = list(block.layers)
        measured = block.collect(names, lambda layer: InputStatistics(layer.dense.shape[1], layer.dense.weight.device))
        BlockSolver(block, measured).solve(folds)

    def make_room(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        _wrap_activations(model, tensors)

    # Loading

    def input_divisors(self, checkpoint: Checkpoint, layers: Sequence[StoredLayer]) -> dict[str, str]:
        """The layer after a divided activation: of its siblings, the one with as many inputs as there are scales."""
        divisors = {}
        for name, header in checkpoint.headers.items():
            owner, _, suffix = name.rpartition(".")
            if suffix != "scales" or len(header.shape) != 1 or any(layer.name == owner for layer in layers):
                continue
            siblings = [layer for layer in layers if layer.name.rpartition(".")[0] == owner.rpartition(".")[0]]
            after = [layer.name for layer in siblings if layer.shape[1] == header.shape[0]]
            if len(after) != 1:
                names = ", ".join(layer.name for layer in siblings) or "no layers"
                raise ValueError(
                    f"{name}: belongs to one of {names}, and their shapes do not tell which; load the model, and use "
                    "quantcore.dequantize and quantcore.save"
                )
            divisors[after[0]] = name
        return divisors

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint: Checkpoint | None = None, **kwargs: Any
    ) -> None:
        if checkpoint is not None:
            _wrap_activations(model, {name: header.empty() for name, header in checkpoint.headers.items()})
        super()._process_model_before_weight_loading(model, checkpoint=checkpoint, **kwargs)


def _wrap_activations(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put divided activations where there are scales for a module without parameters."""
    modules = dict(model.named_modules())
    for name, tensor in tensors.items():
        owner, _, suffix = name.rpartition(".")
        module = modules.get(owner)
        if suffix == "scales" and module is not None and next(module.parameters(), None) is None:
            replace_module(model, owner, ScaledActivation(module, tensor))
