"""What a method says: the formats of its layers, and what its checkpoints hold besides their tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from quantcore.formats.base import WeightFormat
from quantcore.quantizers import selection
from quantcore.quantizers.base import HfQuantizer

if TYPE_CHECKING:
    from quantcore.checkpoints.layers import StoredLayer
    from quantcore.checkpoints.read import Checkpoint
    from quantcore.formats.activation import Activation
    from quantcore.quantizers.plan import PlannedLayer

WeightsOf = Callable[[Collection[str]], Iterable[tuple[str, Tensor]]]  # float weights of layers, by their names

_USUAL_SHAPE = (4096, 4096)  # of a linear layer that every format can store


class DescribedQuantizer(HfQuantizer):
    """What the author of a method overrides; `WeightQuantizer` does the work over it."""

    def format_for(self, name: str, module: nn.Module) -> WeightFormat | None:
        """The format of a linear layer to quantize, by its dtype, shape and name; None leaves it float.

        A fused expert is asked for as the linear layers that it consists of ("mlp.experts.3.gate_proj").
        """
        raise NotImplementedError(f"{type(self).__name__} defines no format_for")

    def embedding_format_for(self, name: str, embedding: nn.Embedding) -> WeightFormat | None:
        """The format of an embedding to quantize, by its dtype, shape and name; None, the default, leaves it float.

        For methods whose config has a way to ask for embeddings. Stored embeddings load whatever this says.
        """
        return None

    def stacked_format_for(self, name: str, weight: Tensor) -> WeightFormat | None:
        """The format of a 3-D weight of experts that is stored whole; None, the default, takes the experts apart.

        name: of the parameter ("mlp.experts.gate_up_proj"). weight: [E, N, K] or [E, K, N], as the model has it.
        """
        return None

    def format_of(self, name: str, module: nn.Module) -> WeightFormat | None:
        """The format of one module that is to be quantized, or is stored so; None where the config leaves it float.

        An embedding of which the config says nothing gets the format of a linear layer.
        """
        if not isinstance(module, nn.Embedding):
            return self.format_for(name, module)
        out_features, in_features = module.weight.shape
        linear = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=module.weight.dtype)
        return self.embedding_format_for(name, module) or self.format_for(name, linear)

    def finalize_formats(self, layers: Sequence[PlannedLayer], weights: WeightsOf) -> Mapping[str, WeightFormat]:
        """The formats of planned layers that depend on the weights of others, by name; none of them by default.

        weights: gives name and weight of the named layers, one at a time in any order.
        """
        return {}

    @property
    def skip_patterns(self) -> list[str] | None:
        """The user's list of modules that stay float; None means the automatic list."""
        return getattr(self.quantization_config, "modules_to_not_convert", None)

    def skips(self, name: str, pattern: str) -> bool:
        """Whether a skip pattern hits a module's name."""
        return selection.matches_pattern(name, pattern)

    @property
    def cache_rounding(self) -> Activation | None:
        """How keys and values are rounded whose scales are stored; None, the default, where the method stores none."""
        return None

    # What a checkpoint holds besides the tensors of layers

    def read_source(self, checkpoint: Checkpoint) -> None:
        """Take over what a checkpoint says of its layers outside of config.json and their tensors.

        Called before the first layer is asked for, and perhaps again; by default nothing is. checkpoint: under the
        names of the model where there is one, with the metadata of its files, its side files, and `stored_name`.
        """

    @property
    def stored_suffixes(self) -> Collection[str]:
        """What layers of this method may call their tensors, dots included, by which their owner is known.

        By default the names in the format of a layer that nothing is said of. A method with several formats adds those
        of the others.
        """
        try:
            weight_format = self.format_for("", nn.Linear(*_USUAL_SHAPE, bias=False, device="meta"))
            specs = () if weight_format is None else weight_format.tensor_specs(_USUAL_SHAPE)
        except (LookupError, NotImplementedError, TypeError, ValueError):  # it depends on the name, or the shape
            return ()
        return tuple(spec.name for spec in specs)

    @property
    def stacked_suffixes(self) -> Collection[str]:
        """What this method calls the tensors of 3-D weights of experts that are stored whole, as "weight_blocks".

        By these the tensors are known where there is no model; none by default.
        """
        return ()

    def input_divisors(self, checkpoint: Checkpoint, layers: Sequence[StoredLayer]) -> dict[str, str]:
        """{layer: tensor [K] beside it by which its input is divided}, where a method stores such; none by default.

        A checkpoint that is written in another format has them in the weights. Raises ValueError where the layer that
        a tensor belongs to cannot be told without the model.
        """
        return {}

    def checkpoint_config(self, layers: Sequence[StoredLayer]) -> dict[str, Any]:
        """What config.json says at its top of the layers that were written: {"quantization_config": ...}."""
        return {"quantization_config": self.quantization_config.to_dict()}

    def checkpoint_metadata(self, layers: Sequence[StoredLayer]) -> dict[str, str]:
        """What the header of every file says; asked before the first tensor is written, so layers are as planned."""
        return {}

    def header_metadata(self, layers: Sequence[StoredLayer], names: Iterable[str]) -> dict[str, str]:
        """As `checkpoint_metadata`, which it is by default, for methods that describe the other tensors too.

        names: of all tensors of the checkpoint.
        """
        return self.checkpoint_metadata(layers)

    def side_files(self, layers: Sequence[StoredLayer]) -> dict[str, bytes]:
        """Files beside the weights, by name, for the layers that were written."""
        return {}
