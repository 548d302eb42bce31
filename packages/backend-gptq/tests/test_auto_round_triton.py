"""AutoRound's weights on Triton's skeletons, in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no build for this platform")


def test_decoders_in_the_interpreter() -> None:
    from quantcore.kernels.triton.checks import run_in_interpreter

    run_in_interpreter(str(Path(__file__).with_name("interpreted_auto_round.py")))
