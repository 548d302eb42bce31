"""The quantizer of VPTQ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from quantcore.sdk import CalibratedQuantizer, Plan, PlannedLayer, dtype_name, weight_dtype
from quantcore_misc.vptq.config import VptqConfig, VptqLayerConfig
from quantcore_misc.vptq.format import Vptq


class VptqQuantizer(CalibratedQuantizer):
    """Every linear layer that the config has settings for; the layers of a block are solved one by one."""

    quantization_config: VptqConfig

    def format_for(self, name: str, module: nn.Module) -> Vptq | None:
        settings = self.quantization_config.for_layer(name)
        return None if settings is None else _format(settings, dtype_name(weight_dtype(module)))

    def plan(self, model: nn.Module) -> Plan:
        """As for every method; the config then has an entry for each planned layer, as readers of the files need it."""
        plan = super().plan(model)
        if not self.pre_quantized:
            entries = {layer.name: _entry(layer) for layer in plan.layers}
            self.quantization_config.update(config_for_layers=entries, shared_layer_config={})
        return plan

    def solve_layer(self, layer: PlannedLayer, hessian: Tensor) -> tuple[Mapping[str, Tensor], float | None]:
        from quantcore_misc.vptq.solver import solve

        return solve(layer.dense.weight, hessian, cast("Vptq", layer.weight_format))


def _format(settings: VptqLayerConfig, float_type: str) -> Vptq:
    has_outliers = settings.outlier_size > 0
    return Vptq(
        vector=settings.vector_lens[1],
        centroids=settings.num_centroids[1],
        residuals=max(settings.num_res_centroids[1], 0),
        groups=settings.group_num,
        outliers=settings.outlier_size,
        outlier_vector=settings.vector_lens[0] if has_outliers else 0,
        outlier_centroids=settings.num_centroids[0] if has_outliers else 0,
        has_order=settings.enable_perm,
        has_norm=settings.enable_norm,
        float_type=float_type,
    )


def _entry(layer: PlannedLayer) -> dict[str, Any]:
    """The settings of a planned layer with all that follows from its shape, as upstream writes them."""
    (out_features, in_features), stored = layer.dense.shape, layer.weight_format
    assert isinstance(stored, Vptq)
    return {
        "bias": layer.dense.bias is not None,
        "enable_norm": stored.has_norm,
        "enable_perm": stored.has_order,
        "group_num": stored.groups,
        "group_size": stored.group_columns(in_features),
        "in_features": in_features,
        "out_features": out_features,
        "indices_as_float": False,
        "is_indice_packed": True,
        "num_centroids": [stored.outlier_centroids or -1, stored.centroids],
        "num_res_centroids": [-1, stored.residuals or -1],
        "outlier_size": stored.outliers,
        "vector_lens": [stored.outlier_vector or -1, stored.vector],
    }
