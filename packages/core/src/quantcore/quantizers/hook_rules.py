"""Which hooks of a quantizer are called, and what a subclass that overrides one of the others is told."""

from __future__ import annotations

from quantcore.errors import QuantcoreError

# Hooks of transformers by which it loads parameter by parameter. Nothing here calls them, for layers are loaded whole:
# an override would be ignored, and the model be wrong without a word. Each with what to do instead.
_LAYERS = "define format_for of a WeightQuantizer, whose layers are quantized and loaded whole"
_SIZES = "sizes are known from the TensorSpecs of the weight formats"
_NAMES = "a WeightFormat names the tensors that it stores, and a checkpoint is compared with them"
_PATTERNS = "define the property skip_patterns of a WeightQuantizer"
_PLANS = "define update_parallel_plan"
_WARM_UP = "nothing is reserved before a load"
UNCALLED = {
    "param_needs_quantization": _LAYERS,
    "get_quantize_ops": _LAYERS,
    "get_load_operations": _LAYERS,
    "get_weight_conversions": _LAYERS,
    "update_weight_conversions": _LAYERS,
    "get_new_dtype": _LAYERS,
    "check_quantized_param": _LAYERS,
    "create_quantized_param": _LAYERS,
    "requires_parameters_quantization": _LAYERS,
    "update_state_dict_with_metadata": "mark a TensorSpec with metadata=True, and override WeightFormat.read",
    "quantized_element_size": _SIZES,
    "param_element_size": _SIZES,
    "adjust_target_dtype": _SIZES,
    "get_special_dtypes_update": _SIZES,
    "update_missing_keys": _NAMES,
    "update_missing_keys_after_loading": _NAMES,
    "update_expected_keys": _NAMES,
    "update_unexpected_keys": _NAMES,
    "get_param_name": _NAMES,
    "update_param_name": _NAMES,
    "get_cuda_warm_up_factor": _WARM_UP,
    "get_accelerator_warm_up_factor": _WARM_UP,
    "get_modules_to_not_convert": _PATTERNS,
    "update_tp_plan": _PLANS,
    "update_ep_plan": _PLANS,
}

# Hooks under their names of transformers 4.x, which serve as those of today.
RENAMED = {"update_torch_dtype": "update_dtype"}


class UncalledHookError(QuantcoreError, TypeError):
    """A quantizer class that overrides hooks which nothing calls; the text says for each what to do instead."""


def check_overrides(quantizer: type) -> None:
    """Raise UncalledHookError for a class that overrides hooks of `UNCALLED`; let hooks of `RENAMED` serve.

    Methods of a class that a quantizer is mixed with count as its own.
    """
    own = [base for base in quantizer.__mro__ if not base.__module__.startswith("quantcore.quantizers.")]
    names = {name for base in own if base is not object for name in vars(base)}
    ignored = [f"{name}: {UNCALLED[name]}" for name in UNCALLED if name in names]
    if ignored:
        raise UncalledHookError(
            f"{quantizer.__name__} overrides what quantcore does not call; remove it:\n" + "\n".join(ignored)
        )
    for old, new in RENAMED.items():
        if old in names and new not in names:
            setattr(quantizer, new, getattr(quantizer, old))
