"""What a backend is made of: `from quantcore.sdk import Backend, hookimpl`, and no other module of quantcore.

A name is imported when it is first asked for, so an entry module that takes `Backend` and `hookimpl` from here stays
cheap. What these names mean is kept from release to release; the modules behind them may move. A few names are modules
of helpers for one theme, used as `packing.pack_words(...)`. The page `docs/sdk.md` lists all of them.
"""

from __future__ import annotations

from quantcore import _lazy

TYPE_CHECKING = False  # as in typing, which an entry module need not load
if TYPE_CHECKING:
    from quantcore import __version__ as __version__, patterns as patterns, threads as threads
    from quantcore.calibration import statistics as statistics
    from quantcore.calibration.activations import Sample as Sample, join_samples as join_samples
    from quantcore.calibration.block import (
        ROUND_TO_NEAREST as ROUND_TO_NEAREST,
        Block as Block,
        token_rows as token_rows,
    )
    from quantcore.calibration.data import Calibration as Calibration
    from quantcore.calibration.engine import Source as Source
    from quantcore.calibration.solvers import SharedSolver as SharedSolver, shared_solver as shared_solver
    from quantcore.calibration.trace import InputGroup as InputGroup
    from quantcore.checkpoints.layers import StoredLayer as StoredLayer
    from quantcore.checkpoints.pickled_classes import Pickled as Pickled
    from quantcore.checkpoints.read import Checkpoint as Checkpoint
    from quantcore.checkpoints.sink import Outline as Outline
    from quantcore.checkpoints.source import Header as Header
    from quantcore.checkpoints.stream import passing_buffers as passing_buffers
    from quantcore.errors import CheckpointError as CheckpointError, MissingExtraError as MissingExtraError
    from quantcore.formats import (
        blocks as blocks,
        interning as interning,
        minifloat as minifloat,
        packing as packing,
        transforms as transforms,
    )
    from quantcore.formats.activation import (
        Activation as Activation,
        QuantizedInput as QuantizedInput,
        abs_max as abs_max,
    )
    from quantcore.formats.base import (
        FLOAT_DTYPES as FLOAT_DTYPES,
        Description as Description,
        TensorSpec as TensorSpec,
        WeightFormat as WeightFormat,
        describe as describe,
        dtype_name as dtype_name,
        float_dtype as float_dtype,
    )
    from quantcore.formats.cached import cached_tensors as cached_tensors
    from quantcore.formats.cutting import Opened as Opened, Reshaped as Reshaped
    from quantcore.formats.elements import (
        NF4_LEVELS as NF4_LEVELS,
        Element as Element,
        Float as Float,
        Integer as Integer,
    )
    from quantcore.formats.families import (
        Affine as Affine,
        Family as Family,
        Lookup as Lookup,
        NestedScale as NestedScale,
        ScaledFloat as ScaledFloat,
        Vector as Vector,
        register_family as register_family,
    )
    from quantcore.formats.grid_layer import GridLayer as GridLayer
    from quantcore.formats.grouping import (
        BlockGroups as BlockGroups,
        ColumnGroups as ColumnGroups,
        Grouping as Grouping,
        column_grouping as column_grouping,
    )
    from quantcore.formats.held import held_scales as held_scales
    from quantcore.formats.layouts import Layout as Layout, Prepared as Prepared
    from quantcore.formats.quantized_weight import QuantizedWeight as QuantizedWeight
    from quantcore.formats.rounded import RoundedLayer as RoundedLayer
    from quantcore.formats.row_chunks import linear_rows as linear_rows, row_chunks as row_chunks
    from quantcore.formats.scaled import Parts as Parts, Scaled as Scaled
    from quantcore.formats.stacked import Stacked as Stacked
    from quantcore.formats.stored_codes import (
        Codes as Codes,
        Number as Number,
        OnGrid as OnGrid,
        Outer as Outer,
        Scale as Scale,
        Zero as Zero,
    )
    from quantcore.kernels import (
        float8 as float8,
        int8_product as int8_product,
        reference as reference,
        verification as verification,
    )
    from quantcore.kernels.dispatch import REFERENCE as REFERENCE
    from quantcore.kernels.kernel import Kernel as Kernel, Problem as Problem
    from quantcore.kernels.triton.decoder import Decoder as Decoder, Words as Words, places as places
    from quantcore.kernels.triton.kernels import kernels_for as kernels_for
    from quantcore.kernels.triton.launch import on_device as on_device
    from quantcore.kernels.triton.minifloats import (
        e4m3_values as e4m3_values,
        e8m0_values as e8m0_values,
        float16_values as float16_values,
        small_float as small_float,
    )
    from quantcore.kernels.triton.rounding import (
        INTERPRETED as INTERPRETED,
        TRITON_DTYPES as TRITON_DTYPES,
        rounded as rounded,
    )
    from quantcore.kernels.triton.tiles import look_up as look_up
    from quantcore.layer_names import spellings as spellings
    from quantcore.nn import kv_cache as kv_cache, rotation as rotation
    from quantcore.nn.dense import (
        DenseLinear as DenseLinear,
        view_dense as view_dense,
        weight_dtype as weight_dtype,
    )
    from quantcore.nn.embedding import QuantizedEmbedding as QuantizedEmbedding
    from quantcore.nn.experts import fused_experts as fused_experts, fused_weights as fused_weights
    from quantcore.nn.linear import QuantizedLinear as QuantizedLinear
    from quantcore.nn.online import OnlineLinear as OnlineLinear
    from quantcore.nn.planned import PlannedLayer as PlannedLayer
    from quantcore.nn.replace import (
        quantized_modules as quantized_modules,
        replace_module as replace_module,
        usual_dtype as usual_dtype,
    )
    from quantcore.plugins.backend import Backend as Backend, Guide as Guide, PerLayer as PerLayer, Refusal as Refusal
    from quantcore.plugins.container import Container as Container
    from quantcore.plugins.hookspecs import hookimpl as hookimpl
    from quantcore.quantization_config import (
        Config as Config,
        QuantizationConfigMixin as QuantizationConfigMixin,
        QuantizationMethod as QuantizationMethod,
        check_group_size as check_group_size,
        check_limits as check_limits,
        check_type as check_type,
        diff_from_default as diff_from_default,
        matches_type as matches_type,
        option as option,
        to_json_value as to_json_value,
        without_synonyms as without_synonyms,
    )
    from quantcore.quantizers import selection as selection
    from quantcore.quantizers.base import HfQuantizer as HfQuantizer
    from quantcore.quantizers.calibrated import CalibratedQuantizer as CalibratedQuantizer
    from quantcore.quantizers.described import WeightsOf as WeightsOf
    from quantcore.quantizers.online import OnlineQuantizer as OnlineQuantizer
    from quantcore.quantizers.placing import dequantize_layers as dequantize_layers
    from quantcore.quantizers.plan import Plan as Plan
    from quantcore.quantizers.weight import WeightQuantizer as WeightQuantizer

# Where each name lives, in the order of the page: "module" or, for a name of its own here, "module:name there".
SECTIONS: dict[str, dict[str, str]] = {
    "The hook": {
        "Backend": "quantcore.plugins.backend",
        "Guide": "quantcore.plugins.backend",
        "Refusal": "quantcore.plugins.backend",
        "PerLayer": "quantcore.plugins.backend",
        "Container": "quantcore.plugins.container",
        "hookimpl": "quantcore.plugins.hookspecs",
        "__version__": "quantcore",
    },
    "The config": {
        "QuantizationConfigMixin": "quantcore.quantization_config",
        "QuantizationMethod": "quantcore.quantization_config",
        "option": "quantcore.quantization_config",
        "check_group_size": "quantcore.quantization_config",
        "without_synonyms": "quantcore.quantization_config",
        "patterns": "quantcore.patterns",
        "check_limits": "quantcore.quantization_config",
        "check_type": "quantcore.quantization_config",
        "matches_type": "quantcore.quantization_config",
        "diff_from_default": "quantcore.quantization_config",
        "to_json_value": "quantcore.quantization_config",
        "Config": "quantcore.quantization_config",
    },
    "The weight format": {
        "WeightFormat": "quantcore.formats.base",
        "TensorSpec": "quantcore.formats.base",
        "QuantizedWeight": "quantcore.formats.quantized_weight",
        "Description": "quantcore.formats.base",
        "Activation": "quantcore.formats.activation",
        "QuantizedInput": "quantcore.formats.activation",
        "abs_max": "quantcore.formats.activation",
        "FLOAT_DTYPES": "quantcore.formats.base",
        "float_dtype": "quantcore.formats.base",
        "dtype_name": "quantcore.formats.base",
        "describe": "quantcore.formats.base",
        "packing": "quantcore.formats.packing",
        "minifloat": "quantcore.formats.minifloat",
        "blocks": "quantcore.formats.blocks",
        "transforms": "quantcore.formats.transforms",
        "cached_tensors": "quantcore.formats.cached",
        "Opened": "quantcore.formats.cutting",
        "Reshaped": "quantcore.formats.cutting",
        "row_chunks": "quantcore.formats.row_chunks:row_chunks",
        "linear_rows": "quantcore.formats.row_chunks",
        "held_scales": "quantcore.formats.held",
        "interning": "quantcore.formats.interning",
    },
    "Scaled grids": {
        "Scaled": "quantcore.formats.scaled",
        "Integer": "quantcore.formats.elements",
        "Float": "quantcore.formats.elements",
        "Element": "quantcore.formats.elements",
        "NF4_LEVELS": "quantcore.formats.elements",
        "Codes": "quantcore.formats.stored_codes",
        "Scale": "quantcore.formats.stored_codes",
        "Zero": "quantcore.formats.stored_codes",
        "Outer": "quantcore.formats.stored_codes",
        "Number": "quantcore.formats.stored_codes",
        "OnGrid": "quantcore.formats.stored_codes",
        "Parts": "quantcore.formats.scaled",
        "GridLayer": "quantcore.formats.grid_layer",
        "RoundedLayer": "quantcore.formats.rounded",
        "Stacked": "quantcore.formats.stacked",
    },
    "Families": {
        "Family": "quantcore.formats.families",
        "register_family": "quantcore.formats.families",
        "Affine": "quantcore.formats.families",
        "ScaledFloat": "quantcore.formats.families",
        "Lookup": "quantcore.formats.families",
        "Vector": "quantcore.formats.families",
        "NestedScale": "quantcore.formats.families",
        "Grouping": "quantcore.formats.grouping",
        "BlockGroups": "quantcore.formats.grouping",
        "ColumnGroups": "quantcore.formats.grouping",
        "column_grouping": "quantcore.formats.grouping",
    },
    "The quantizer": {
        "WeightQuantizer": "quantcore.quantizers.weight",
        "HfQuantizer": "quantcore.quantizers.base",
        "Plan": "quantcore.quantizers.plan",
        "PlannedLayer": "quantcore.nn.planned",
        "WeightsOf": "quantcore.quantizers.described",
        "selection": "quantcore.quantizers.selection",
        "dequantize_layers": "quantcore.quantizers.placing",
        "spellings": "quantcore.layer_names",
        "Checkpoint": "quantcore.checkpoints.read",
        "StoredLayer": "quantcore.checkpoints.layers",
        "Pickled": "quantcore.checkpoints.pickled_classes",
        "Header": "quantcore.checkpoints.source",
        "passing_buffers": "quantcore.checkpoints.stream",
        "Outline": "quantcore.checkpoints.sink",
        "CheckpointError": "quantcore.errors",
        "MissingExtraError": "quantcore.errors",
    },
    "Solvers that read data": {
        "CalibratedQuantizer": "quantcore.quantizers.calibrated",
        "OnlineQuantizer": "quantcore.quantizers.online",
        "Calibration": "quantcore.calibration.data",
        "Block": "quantcore.calibration.block",
        "Sample": "quantcore.calibration.activations",
        "InputGroup": "quantcore.calibration.trace",
        "Source": "quantcore.calibration.engine",
        "statistics": "quantcore.calibration.statistics",
        "SharedSolver": "quantcore.calibration.solvers",
        "shared_solver": "quantcore.calibration.solvers",
        "token_rows": "quantcore.calibration.block",
        "join_samples": "quantcore.calibration.activations",
        "ROUND_TO_NEAREST": "quantcore.calibration.block",
        "threads": "quantcore.threads",
    },
    "Layers": {
        "QuantizedLinear": "quantcore.nn.linear",
        "QuantizedEmbedding": "quantcore.nn.embedding",
        "OnlineLinear": "quantcore.nn.online",
        "DenseLinear": "quantcore.nn.dense",
        "view_dense": "quantcore.nn.dense",
        "weight_dtype": "quantcore.nn.dense",
        "fused_experts": "quantcore.nn.experts",
        "fused_weights": "quantcore.nn.experts",
        "quantized_modules": "quantcore.nn.replace",
        "replace_module": "quantcore.nn.replace",
        "usual_dtype": "quantcore.nn.replace",
        "kv_cache": "quantcore.nn.kv_cache",
        "rotation": "quantcore.nn.rotation",
    },
    "Kernels": {
        "kernels_for": "quantcore.kernels.triton.kernels",
        "Decoder": "quantcore.kernels.triton.decoder",
        "Words": "quantcore.kernels.triton.decoder",
        "places": "quantcore.kernels.triton.decoder",
        "rounded": "quantcore.kernels.triton.rounding",
        "look_up": "quantcore.kernels.triton.tiles",
        "e4m3_values": "quantcore.kernels.triton.minifloats",
        "e8m0_values": "quantcore.kernels.triton.minifloats",
        "float16_values": "quantcore.kernels.triton.minifloats",
        "small_float": "quantcore.kernels.triton.minifloats",
        "TRITON_DTYPES": "quantcore.kernels.triton.rounding",
        "INTERPRETED": "quantcore.kernels.triton.rounding",
        "on_device": "quantcore.kernels.triton.launch",
        "Kernel": "quantcore.kernels.kernel",
        "Layout": "quantcore.formats.layouts",
        "Prepared": "quantcore.formats.layouts",
        "Problem": "quantcore.kernels.kernel",
        "REFERENCE": "quantcore.kernels.dispatch",
        "reference": "quantcore.kernels.reference",
        "verification": "quantcore.kernels.verification",
        "float8": "quantcore.kernels.float8",
        "int8_product": "quantcore.kernels.int8_product",
    },
}
_TARGETS = {name: target for section in SECTIONS.values() for name, target in section.items()}

__getattr__, __dir__ = _lazy.attributes(__name__, _TARGETS)
__all__ = list(_TARGETS)
