"""PEFT (extra `peft`): LoRA and DoRA on quantized layers of every method, embeddings and experts too; merging.

Nothing of PEFT is imported before one of these is asked for, and nothing of it is changed.
"""

from __future__ import annotations

from quantcore import _lazy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from quantcore.integrations.peft.experts import LoraQuantizedExperts as LoraQuantizedExperts
    from quantcore.integrations.peft.layer import (
        LoraQuantizedEmbedding as LoraQuantizedEmbedding,
        LoraQuantizedLinear as LoraQuantizedLinear,
    )
    from quantcore.integrations.peft.model import (
        add_adapter as add_adapter,
        get_peft_model as get_peft_model,
        load_adapter as load_adapter,
        merge_errors as merge_errors,
        merge_to_float as merge_to_float,
        prepare_model_for_kbit_training as prepare_model_for_kbit_training,
        register as register,
    )

_MODEL = "quantcore.integrations.peft.model"

__getattr__, __dir__ = _lazy.attributes(
    __name__,
    {
        "LoraQuantizedEmbedding": "quantcore.integrations.peft.layer",
        "LoraQuantizedExperts": "quantcore.integrations.peft.experts",
        "LoraQuantizedLinear": "quantcore.integrations.peft.layer",
        "add_adapter": _MODEL,
        "get_peft_model": _MODEL,
        "load_adapter": _MODEL,
        "merge_errors": _MODEL,
        "merge_to_float": _MODEL,
        "prepare_model_for_kbit_training": _MODEL,
        "register": _MODEL,
    },
)
