"""What the floors below ask of the integration of transformers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from quantcore.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


@hookimpl(trylast=True)
def quantcore_held_quantizer(quantizer: Any, model: nn.Module) -> Any:
    """For a model of transformers, the quantizer behind the interface that its methods look for."""
    modeling_utils = sys.modules.get("transformers.modeling_utils")  # there is none while it is not imported
    if modeling_utils is None or not isinstance(model, modeling_utils.PreTrainedModel):
        return None
    from quantcore.integrations.transformers.adapter import shown_to_transformers

    return shown_to_transformers(quantizer, model)


@hookimpl(trylast=True)
def quantcore_tokenizer(directory: Path) -> Any:
    from quantcore.integrations.transformers.building import load_tokenizer

    return load_tokenizer(directory)
