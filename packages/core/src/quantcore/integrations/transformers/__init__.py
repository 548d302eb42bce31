"""transformers (extra `transformers`): serving `from_pretrained`, and building architectures and tokenizers.

Nothing of transformers is imported or changed before one of these functions is called.
"""

from __future__ import annotations

from quantcore import _lazy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from quantcore.integrations.transformers.building import (
        build_model as build_model,
        load_tokenizer as load_tokenizer,
    )
    from quantcore.integrations.transformers.serving import (
        disable as disable,
        enable as enable,
        use as use,
    )

__getattr__, __dir__ = _lazy.attributes(
    __name__,
    {
        "build_model": "quantcore.integrations.transformers.building",
        "disable": "quantcore.integrations.transformers.serving",
        "enable": "quantcore.integrations.transformers.serving",
        "load_tokenizer": "quantcore.integrations.transformers.building",
        "use": "quantcore.integrations.transformers.serving",
    },
)
