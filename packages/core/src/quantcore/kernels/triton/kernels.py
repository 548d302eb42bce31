"""The skeletons as kernels that dispatch can choose. Nothing here imports triton before a problem lies on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from quantcore.formats.base import WeightFormat, dtype_name
from quantcore.kernels.dispatch import REFERENCE
from quantcore.kernels.kernel import Kernel, Problem
from quantcore.kernels.triton.decoder import Decoder
from quantcore.kernels.triton.heuristics import DENSE_ROWS
from quantcore.plugins.backend import import_string

MOST_GEMV_ROWS = 16
_PRIORITY = REFERENCE.priority + 10
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(label: str, target: str) -> list[Kernel]:
    """The kernels gemv_<label> and gemm_<label> of the formats that a backend has decoders for.

    target: "module:function"; the function gives the Decoder of a weight format, or None. Its module may import
    triton: it is imported when the first problem on a GPU is asked about.
    """
    served = _Served(target)
    gemv = Kernel(
        name=f"gemv_{label}",
        group="triton",
        refuse=served.refuse_gemv,
        linear=served.gemv,
        linear_input_grad=served.linear_input_grad,
        priority=_PRIORITY + 1,
        on_trial=True,
        decoder=target,
    )
    gemm = replace(
        gemv,
        name=f"gemm_{label}",
        refuse=served.refuse,
        linear=served.gemm,
        priority=_PRIORITY,
        grouped_linear=served.grouped_linear,
    )
    return [gemv, gemm]


@cache
def scaled_kernels() -> tuple[Kernel, ...]:
    """The kernels of every `Scaled` format, whatever backend it is of."""
    return tuple(kernels_for("scaled", "quantcore.kernels.triton.scaled:decoder_for"))


@dataclass(frozen=True)
class _Served:
    """The skeletons for the formats that one decoder function knows."""

    target: str

    def refuse(self, problem: Problem) -> str | None:
        """Why the skeletons cannot serve a problem, or None."""
        if problem.device != "cuda":
            return f"runs on a CUDA or HIP device, not on {problem.device}"
        if find_spec("triton") is None:
            return "triton is not installed; pip install triton"
        compute = problem.weight_format.compute_torch_dtype
        for what, dtype in (("input", problem.dtype), ("compute", compute or problem.dtype)):
            if dtype not in DTYPES:
                return f"{what} dtype {dtype_name(dtype)} is none of {', '.join(map(dtype_name, DTYPES))}"
        if problem.op == "grouped_linear" and problem.M > DENSE_ROWS:
            return f"experts of more than {DENSE_ROWS} rows are faster one by one"
        if problem.op == "grouped_linear" and not problem.weight_format.rounds_rows_apart:
            return "experts each round their input by a scale of their own"
        if self._find(problem.weight_format) is None:
            return f"no decoder for {problem.weight_format!r}"
        return None

    def refuse_gemv(self, problem: Problem) -> str | None:
        """As `refuse`, and for more rows than gemv takes."""
        if problem.op == "linear" and problem.M > MOST_GEMV_ROWS:
            return f"serves at most {MOST_GEMV_ROWS} rows, not {problem.M}"
        return self.refuse(problem)

    def gemv(
        self, x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, weight_format: WeightFormat, out_features: int
    ) -> Tensor:
        from quantcore.kernels.triton import launch

        return self._linear(launch.gemv, x, operands, bias, weight_format, out_features)

    def gemm(
        self, x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, weight_format: WeightFormat, out_features: int
    ) -> Tensor:
        from quantcore.kernels.triton import launch

        return self._linear(launch.gemm, x, operands, bias, weight_format, out_features)

    def _linear(
        self,
        product: Callable[..., Tensor],
        x: Tensor,
        operands: Sequence[Tensor],
        bias: Tensor | None,
        weight_format: WeightFormat,
        out_features: int,
    ) -> Tensor:
        """A product over the weight alone, of an input and with an output that are rounded as the format says."""
        decoder, dtype = self._decoder(weight_format), weight_format.compute_torch_dtype
        if not _rounds(weight_format):
            return product(x, operands, bias, decoder, out_features, dtype)
        shape = (out_features, x.shape[-1])
        named = _named(weight_format, operands, shape)
        rounded = weight_format.round_activation("input", x, named).to(x.dtype)
        y = product(rounded, _of_weight(weight_format, named, shape), bias, decoder, out_features, dtype)
        return weight_format.round_activation("output", y, named)

    def grouped_linear(
        self,
        x: Tensor,
        ends: Tensor,
        experts: Sequence[Sequence[Tensor]],
        weight_format: WeightFormat,
        out_features: int,
    ) -> Tensor:
        from quantcore.kernels.triton import launch

        decoder, dtype = self._decoder(weight_format), weight_format.compute_torch_dtype
        if not _rounds(weight_format):
            return launch.grouped(x, ends, experts, decoder, out_features, dtype)
        shape = (out_features, x.shape[-1])
        named = [_named(weight_format, operands, shape) for operands in experts]
        rounded = weight_format.round_activation("input", x, named[0]).to(x.dtype)
        weights = [_of_weight(weight_format, each, shape) for each in named]
        y = launch.grouped(rounded, ends, weights, decoder, out_features, dtype)
        return weight_format.round_activation("output", y, named[0])

    def linear_input_grad(
        self, grad: Tensor, operands: Sequence[Tensor], weight_format: WeightFormat, in_features: int
    ) -> Tensor:
        from quantcore.kernels.triton import launch

        if _rounds(weight_format):
            shape = (grad.shape[-1], in_features)
            operands = _of_weight(weight_format, _named(weight_format, operands, shape), shape)
        return launch.linear_input_grad(grad, operands, self._decoder(weight_format), in_features)

    def _find(self, weight_format: WeightFormat) -> Decoder | None:
        return _decoder_for(self.target, weight_format)

    def _decoder(self, weight_format: WeightFormat) -> Decoder:
        decoder = self._find(weight_format)
        if decoder is None:
            raise ValueError(f"{self.target} has no decoder for {weight_format!r}; use the reference kernel")
        return decoder


@lru_cache(maxsize=1024)
def _decoder_for(target: str, weight_format: WeightFormat) -> Decoder | None:
    find: Callable[[WeightFormat], Decoder | None] = import_string(target)
    return find(_alone(weight_format))


@lru_cache(maxsize=1024)
def _alone(weight_format: WeightFormat) -> WeightFormat:
    return weight_format.weight_alone()


def _rounds(weight_format: WeightFormat) -> bool:
    """Whether a layer of this format rounds activations."""
    return _alone(weight_format) is not weight_format


def _named(weight_format: WeightFormat, operands: Sequence[Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    return dict(zip(weight_format.operand_names(shape), operands, strict=True))


def _of_weight(weight_format: WeightFormat, named: Mapping[str, Tensor], shape: tuple[int, int]) -> list[Tensor]:
    """Those operands that are of the weight alone."""
    return [named[name] for name in _alone(weight_format).operand_names(shape)]
