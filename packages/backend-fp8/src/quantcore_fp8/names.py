"""The suffixes under which tools store the scales of one layer, and the names of experts that are stored whole."""

from __future__ import annotations

import re

SCALE_NAMES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")  # transformers, vLLM, DeepSeek, Mistral
INPUT_SCALE_NAMES = ("activation_scale", "input_scale", "qscale_act", "weight_activation_scale")  # the last of experts
CACHE_SCALE_NAMES = ("k_scale", "v_scale", "q_scale", "prob_scale", "output_scale")  # of keys and values, for serving
STACK = re.compile(r"(^|\.)experts\.\w*[a-z]\w*$")  # a 3-D parameter of experts, not a layer of one of them
