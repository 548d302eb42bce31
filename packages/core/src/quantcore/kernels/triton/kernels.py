"""The skeletons as kernels that dispatch can choose. Nothing here imports triton before a problem lies on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from quantcore.formats.base import WeightFormat, dtype_name
from quantcore.kernels.dispatch import REFERENCE, Kernel, Problem
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
    grad, grouped = served.linear_input_grad, served.grouped_linear
    return [
        Kernel(f"gemv_{label}", "triton", served.refuse_gemv, served.gemv, grad, _PRIORITY + 1, on_trial=True),
        Kernel(
            f"gemm_{label}",
            "triton",
            served.refuse,
            served.gemm,
            grad,
            _PRIORITY,
            on_trial=True,
            grouped_linear=grouped,
        ),
    ]


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

        decoder = self._decoder(weight_format)
        return launch.gemv(x, operands, bias, decoder, out_features, weight_format.compute_torch_dtype)

    def gemm(
        self, x: Tensor, operands: Sequence[Tensor], bias: Tensor | None, weight_format: WeightFormat, out_features: int
    ) -> Tensor:
        from quantcore.kernels.triton import launch

        decoder = self._decoder(weight_format)
        return launch.gemm(x, operands, bias, decoder, out_features, weight_format.compute_torch_dtype)

    def grouped_linear(
        self,
        x: Tensor,
        ends: Tensor,
        experts: Sequence[Sequence[Tensor]],
        weight_format: WeightFormat,
        out_features: int,
    ) -> Tensor:
        from quantcore.kernels.triton import launch

        decoder = self._decoder(weight_format)
        return launch.grouped(x, ends, experts, decoder, out_features, weight_format.compute_torch_dtype)

    def linear_input_grad(
        self, grad: Tensor, operands: Sequence[Tensor], weight_format: WeightFormat, in_features: int
    ) -> Tensor:
        from quantcore.kernels.triton import launch

        return launch.linear_input_grad(grad, operands, self._decoder(weight_format), in_features)

    def _find(self, weight_format: WeightFormat) -> Decoder | None:
        decoder_for: Callable[[WeightFormat], Decoder | None] = import_string(self.target)
        return decoder_for(weight_format)

    def _decoder(self, weight_format: WeightFormat) -> Decoder:
        decoder = self._find(weight_format)
        if decoder is None:
            raise ValueError(f"{self.target} has no decoder for {weight_format!r}; use the reference kernel")
        return decoder
