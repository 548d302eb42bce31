"""The suffixes under which tools store the scales of one layer."""

from __future__ import annotations

SCALE_NAMES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")  # transformers, vLLM, DeepSeek, Mistral
INPUT_SCALE_NAMES = ("activation_scale", "input_scale", "qscale_act")
CACHE_SCALE_NAMES = ("k_scale", "v_scale", "q_scale", "prob_scale", "output_scale")  # of keys and values, for serving
