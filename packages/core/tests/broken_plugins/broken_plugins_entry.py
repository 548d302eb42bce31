"""The plugin of the broken methods, and of `sound`, the method that each of them is but for its one fault."""

from __future__ import annotations

from collections.abc import Iterable

from quantcore.plugins import Backend, hookimpl

SOUND = "sound"
FORMAT_FAULTS = (
    "wrong-spec-dtype",
    "lossy-repr",
    "random-codes",
    "changes-the-weight",
    "needs-contiguous",
    "ignores-the-dtype",
    "forgets-the-dtype-it-reads",
    "wrong-family",
    "raises-to-other-tensors",
    "half-the-scale",
    "nan-for-zeros",
    "crashes-on-one-row",
    "checks-no-tensors",
    "mixes-its-rows",
)
LAYER_FAULTS = (
    "no-scale-in-the-state",
    "casts-the-scale",
    "forgets-the-bias",
    "wrong-gradient",
    "rounds-what-it-loads",
)
CALIBRATED = ("sound-calibrated", "changes-with-time")
CONFIG_FAULTS = ("forgets-unknown-keys", "checks-no-types", "shares-its-lists", "hides-its-calibration")
KERNEL_FAULTS = ("decodes-other-numbers", "does-not-compile", "declares-its-gap")
WITH_KERNELS = ("layer_faults", "kernel_faults")
GAPS = {"declares-its-gap": {"test_skeletons_compile_*": "a loop over a number that is no constant"}}


def _backend(method: str, module: str) -> Backend:
    name = method.title().replace("-", "")
    return Backend(
        method,
        f"{module}:{name}Config",
        f"{module}:{name}Quantizer",
        kernels=(f"{module}:kernels",) if module in WITH_KERNELS else (),
        needs_calibration=method in CALIBRATED,
        gaps=GAPS.get(method, {}),
    )


@hookimpl
def quantcore_backends() -> Iterable[Backend]:
    modules = {"format_faults": FORMAT_FAULTS, "layer_faults": LAYER_FAULTS, "config_faults": CONFIG_FAULTS}
    modules |= {"calibrated_faults": CALIBRATED, "kernel_faults": KERNEL_FAULTS}
    yield _backend(SOUND, "sound")
    for module, methods in modules.items():
        for method in methods:
            yield _backend(method, module)
