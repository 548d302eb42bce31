"""Every name inside of transformers that this package counts on: its own, which a release may change without a word.

An import that fails says so itself. An attribute, an argument or a class that is looked up by a name does not: the code
that asks for it would take its absence for an answer. Such names stand here alone, and a test holds each of them
against the release that is installed.
"""

from __future__ import annotations

from typing import Any

# Arguments of attention modules for the cache of keys and values. transformers has had them all: 5.24 renamed
# past_key_values to cache. Where a module has two, the first of these is the cache.
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past", "layer_state")
COMBINED_CACHES = ("self_attention_cache", "cross_attention_cache")  # parts of the cache of an encoder with a decoder

# Attributes of a model
BASE_PREFIX = "base_model_prefix"
CONVERSIONS_OF_LOAD = "_weight_conversions"
COUNT = "num_parameters"
DEVICE_MAP = "hf_device_map"
DEVICE_MESH = "_device_mesh"
PLAN = "_tp_plan"
IGNORED_IF_MISSING = "_keys_to_ignore_on_load_missing"
IGNORED_IF_SURPLUS = "_keys_to_ignore_on_load_unexpected"
KEPT_IN_FLOAT32 = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
TIED_KEYS = "_tied_weights_keys"
TIED_WEIGHTS = "all_tied_weights_keys"
UNSPLIT_MODULES = "_no_split_modules"

# Attributes of a module or a parameter
CONV1D = "Conv1D"
CONV1D_FEATURES = "nf"
EXPERT_PARALLEL = "_is_expert_parallel"
EXPERTS_CONCATENATED = "is_concatenated"
EXPERTS_COUNT = "num_experts"
EXPERTS_GATED = "has_gate"
EXPERTS_TRANSPOSED = "is_transposed"
INITIALIZED = "_is_hf_initialized"

# Attributes of a config, and the method that gives the part of it for text
ATTENTION = "_attn_implementation"
DISTRIBUTED = "distributed_config"
LAYERS = "num_hidden_layers"
LAYERS_TO_PREDICT = "num_nextn_predict_layers"
NAME_OR_PATH = "_name_or_path"
PARALLEL_PLANS = ("base_model_tp_plan", "base_model_ep_plan")
SUB_CONFIGS = "sub_configs"
TEXT_CONFIG = "get_text_config"
TIES_EMBEDDINGS = "tie_word_embeddings"

# Functions, classes and tables that are found by name
CONVERSION_MAPPING = "get_model_conversion_mapping"  # of conversion_mapping
EXPERTS_FUNCTIONS = "ALL_EXPERTS_FUNCTIONS"  # of integrations.moe
EXPERTS_MODULE = "transformers.integrations.moe"
FLASH_TEST = "is_flash_attn_{}_available"  # of utils, by the number of a flash attention
NO_SPLIT = "replicate"  # of ALL_PARALLEL_STYLES
GROUPED_EXPERTS = "grouped_mm"  # of ALL_EXPERTS_FUNCTIONS
MERGES_EXPERTS = "MergeModulelist"  # of core_model_loading
CHANGES_PREFIX = "PrefixChange"  # of core_model_loading


def text_config(config: Any, **options: Any) -> Any:
    """The part for text of a model's config, itself where it has no parts; None for a config of another kind."""
    give = getattr(config, TEXT_CONFIG, None)
    return give(**options) if callable(give) else None
