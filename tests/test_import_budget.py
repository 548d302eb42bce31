"""The backends' modules that discovery names are cheap: neither torch nor a compiler comes with them."""

from __future__ import annotations

import subprocess
import sys

import pytest

FORBIDDEN = ["torch", "numpy", "triton", "transformers", "accelerate", "sympy"]


@pytest.mark.parametrize(
    "module", ["quantcore_bnb", "quantcore_bnb.bitsandbytes", "quantcore_hqq", "quantcore_hqq.hqq"]
)
def test_entry_module_loads_no_heavy_package(module: str) -> None:
    code = f"import sys, {module}; {module}.quantcore_backends(); print(*set(sys.modules) & set({FORBIDDEN!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_asking_for_a_backend_loads_no_torch() -> None:
    code = (
        "import sys; from quantcore.plugins.manager import plugins; "
        "plugins().backend('hqq'); plugins().backend('bitsandbytes'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
