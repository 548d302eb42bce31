"""The conformance suite fails methods that are broken in one way each, by the test that is meant for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import quantcore
from quantcore.errors import MissingExtraError, UnknownMethodError
from quantcore.testing import THEMES, run

SOURCE = Path(quantcore.__file__).parents[1]
BROKEN_PLUGINS = Path(__file__).parent / "broken_plugins"
ROW_INT8 = Path(__file__).parents[3] / "tests" / "third_party" / "quantcore-plugin-rowint8"

# Method, the theme of the suite that must notice, and the test that must fail.
FAULTS = [
    ("heavy-entry", "config", "test_entry_module_imports_nothing_heavy"),
    ("forgets-unknown-keys", "config", "test_unknown_keys_survive_a_round_trip"),
    ("checks-no-types", "config", "test_wrong_type_raises_an_error_that_names_the_field"),
    ("shares-its-lists", "config", "test_dict_of_a_config_shares_nothing_with_it"),
    ("hides-its-calibration", "config", "test_declared_need_of_calibration_is_that_of_the_quantizer"),
    ("wrong-spec-dtype", "format", "test_quantize_gives_what_the_specs_say"),
    ("lossy-repr", "format", "test_repr_rebuilds_the_format"),
    ("random-codes", "format", "test_quantize_is_deterministic"),
    ("changes-the-weight", "format", "test_quantize_leaves_the_weight_as_it_was"),
    ("needs-contiguous", "format", "test_quantize_takes_a_transposed_weight"),
    ("ignores-the-dtype", "format", "test_dequantize_gives_the_shape_dtype_and_device"),
    ("forgets-the-dtype-it-reads", "format", "test_format_that_was_read_dequantizes_to_the_same_bits"),
    ("wrong-family", "format", "test_lowered_weight_dequantizes_to_the_same_bits"),
    ("raises-to-other-tensors", "format", "test_raised_tensors_are_the_stored_ones"),
    ("half-the-scale", "values", "test_error_is_below_the_bound_for_the_bits"),
    ("nan-for-zeros", "values", "test_weight_of_zeros_gives_zeros"),
    ("crashes-on-one-row", "values", "test_odd_shape_works_or_is_refused_by_name"),
    ("no-scale-in-the-state", "state", "test_state_dict_has_the_names_of_the_specs"),
    ("casts-the-scale", "state", "test_cast_leaves_stored_bytes_alone"),
    ("forgets-the-bias", "layer", "test_forward_is_that_of_the_dequantized_weight"),
    ("wrong-gradient", "layer", "test_gradient_of_the_input_is_that_of_the_dequantized_weight"),
    ("rounds-what-it-loads", "model", "test_loaded_model_gives_the_same_bits"),
    ("mixes-its-rows", "kinds", "test_rows_are_those_of_the_dequantized_weight"),
    (
        "changes-with-time",
        "calibration",
        "test_calibration_from_file_to_file_gives_the_files_of_the_saved_model_and_again_from_its_finished_blocks",
    ),
    ("checks-no-tensors", "damage", "test_each_tensor_of_wrong_dtype_is_named"),
    ("decodes-other-numbers", "kernels", "test_decoder_gives_the_numbers_of_the_format"),
    ("does-not-compile", "kernels", "test_skeletons_compile_with_the_decoder_and_spill_nothing"),
]

# Runs the suite on (method, theme) after (method, theme) and prints {method: [status, names of failed tests]}.
RUN_EACH = """
import contextlib, io, json, re, sys
from quantcore.testing import run
outcomes = {}
for method, theme in json.loads(sys.argv[1]):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = run(method, themes=[theme])
    failed = re.findall(r"^FAILED .*?::(test_\\w+)", output.getvalue(), flags=re.MULTILINE)
    outcomes[method] = [status, sorted(set(failed))]
print(json.dumps(outcomes))
"""
RUN_WHOLE = "import sys, quantcore.testing; sys.exit(quantcore.testing.run(sys.argv[1]))"


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[int, list[str]]]:
    """Exit status of the suite and the tests that failed, by broken method."""
    tasks = json.dumps([(method, theme) for method, theme, _ in FAULTS])
    plugins = "broken_plugins_entry,heavy_entry"
    result = _python(RUN_EACH, tasks, paths=[BROKEN_PLUGINS], plugins=plugins, options="--tb=no -m 'not slow'")
    assert result.returncode == 0, result.stderr
    found: dict[str, tuple[int, list[str]]] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("method", "expected"), [(each[0], each[2]) for each in FAULTS], ids=[each[0] for each in FAULTS]
)
def test_broken_method_fails(outcomes: Mapping[str, tuple[int, list[str]]], method: str, expected: str) -> None:
    status, failed = outcomes[method]
    assert status == pytest.ExitCode.TESTS_FAILED
    assert expected in failed


def test_decoder_that_only_the_interpreter_takes_fails_where_it_is_compiled(
    outcomes: Mapping[str, tuple[int, list[str]]],
) -> None:
    assert outcomes["does-not-compile"][1] == ["test_skeletons_compile_with_the_decoder_and_spill_nothing"]


def test_declared_gaps_are_expected_failures() -> None:
    code = "import sys, quantcore.testing; sys.exit(quantcore.testing.run(sys.argv[1], themes=['kernels']))"
    result = _python(code, "declares-its-gap", paths=[BROKEN_PLUGINS], plugins="broken_plugins_entry")
    assert result.returncode == pytest.ExitCode.OK, result.stdout
    assert "4 xfailed" in result.stdout


@pytest.mark.parametrize("method", ["sound", "sound-calibrated"])
def test_method_that_the_broken_ones_are_made_from_passes(method: str) -> None:
    result = _python(RUN_WHOLE, method, paths=[BROKEN_PLUGINS], plugins="broken_plugins_entry")
    assert result.returncode == pytest.ExitCode.OK, result.stdout


def test_method_of_a_stranger_passes() -> None:
    result = _python(RUN_WHOLE, "rowint8", paths=[ROW_INT8], plugins="rowint8")
    assert result.returncode == pytest.ExitCode.OK, result.stdout


def test_every_theme_notices_a_fault() -> None:
    assert {theme for _, theme, _ in FAULTS} == set(THEMES)


def test_unknown_theme_is_refused() -> None:
    with pytest.raises(ValueError, match="theme 'formats' is unknown"):
        run("sound", themes=["formats"])


def test_unknown_method_is_refused() -> None:
    with pytest.raises(UnknownMethodError, match="no-such-method"):
        run("no-such-method")


def test_suite_without_pytest_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(MissingExtraError, match="pip install pytest"):
        run("sound")


def _python(
    code: str, argument: str, *, paths: list[Path], plugins: str, options: str = "--tb=line"
) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that finds the plugins in paths; options go to every pytest in it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("QUANTCORE_", "PYTEST_"))}
    search = os.pathsep.join(map(str, [*paths, SOURCE]))
    environment = {
        **kept,
        "OMP_NUM_THREADS": "1",  # threads gain nothing on tensors so small
        "PYTHONPATH": search,
        "QUANTCORE_PLUGINS": plugins,
        "PYTEST_ADDOPTS": options,
    }
    command = [sys.executable, "-c", code, argument]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
