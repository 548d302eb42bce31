"""Theme config: the config class, its JSON, its checks, and the cost of finding it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantcore.plugins.backend import Backend, import_string
from quantcore.plugins.discovery import providers
from quantcore.plugins.known import normalize_method
from quantcore.plugins.manager import plugins
from quantcore.quantization_config import QuantizationConfigMixin, matches_type, to_json_value, type_hints
from quantcore.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig, quantizer_class
from quantcore.quantizers.base import HfQuantizer
from quantcore.quantizers.calibrated import CalibratedQuantizer
from quantcore.testing.subjects import Example

pytestmark = pytest.mark.side_by_side  # methods are found, and configs told apart, among all that are installed

HEAVY = ("torch", "triton", "transformers")
JUNK = ("no such value", -7.5, [["junk"]], {"junk": [None]})  # a value of each kind that JSON has
UNKNOWN_KEY = {"key_of_a_later_version": {"nested": [1, None, "text"]}}

_NAME_LOADED = """
import json, sys
from quantcore.plugins.manager import plugins
plugins().backend(sys.argv[1])
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_method_name_is_canonical(backend: Backend) -> None:
    assert normalize_method(backend.method) == backend.method


def test_entry_module_imports_nothing_heavy(backend: Backend) -> None:
    named = plugins().named_providers()
    module = named[backend.method].module if backend.method in named else ""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "QUANTCORE_PLUGINS": module}
    command = [sys.executable, "-c", _NAME_LOADED, backend.method]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert sorted(set(HEAVY) & set(json.loads(result.stdout))) == []


def test_entry_module_claims_its_method_alone(backend: Backend) -> None:
    assert len(providers().get(backend.method, ())) <= 1


def test_config_class_is_a_config(backend: Backend) -> None:
    assert issubclass(import_string(backend.config), QuantizationConfigMixin)


def test_backend_declares_an_example_config(backend: Backend) -> None:
    assert len(backend.example_configs) > 0


def test_example_config_is_json(example: Example) -> None:
    assert json.loads(json.dumps(example.config_dict)) == example.config_dict


def test_example_config_parses_to_the_config_class(example: Example) -> None:
    assert type(example.config()) is import_string(example.backend.config)


def test_example_config_gives_a_quantizer(example: Example) -> None:
    assert issubclass(quantizer_class(example.config()), HfQuantizer)


def test_quantizer_reads_checkpoints_of_the_example_config(example: Example) -> None:
    assert AutoHfQuantizer.from_config(example.config(), pre_quantized=True).pre_quantized


def test_declared_need_of_calibration_is_that_of_the_quantizer(example: Example) -> None:
    quantizer = example.quantizer()
    needs_data = isinstance(quantizer, CalibratedQuantizer) and quantizer.needs_data
    assert (quantizer.requires_calibration or needs_data) == example.backend.needs_calibration


def test_quant_method_is_the_method(example: Example) -> None:
    config = example.config()
    assert normalize_method(config.quant_method) == example.backend.method
    assert normalize_method(config.to_dict()["quant_method"]) == example.backend.method


def test_config_keeps_the_values_of_the_example(example: Example) -> None:
    config = example.config()
    names = {field.name for field in dataclasses.fields(config)} & example.config_dict.keys()
    given = {name: _spelled(example.config_dict[name]) for name in names}
    held, written = ({name: _spelled(of[name]) for name in names} for of in (dict(config), config.to_dict()))
    # A config may hold a value in words of its own, and write it in those of the dict.
    assert {name: held[name] if held[name] == given[name] else written[name] for name in names} == given


def test_dict_round_trip_gives_an_equal_config(example: Example) -> None:
    config = example.config()
    assert type(config).from_dict(config.to_dict()) == config
    assert AutoQuantizationConfig.from_dict(config.to_dict()) == config


def test_json_round_trip_gives_an_equal_config(example: Example, tmp_path: Path) -> None:
    config = example.config()
    config.to_json_file(tmp_path / "config.json")
    assert AutoQuantizationConfig.from_dict(json.loads(config.to_json_string(use_diff=False))) == config
    assert AutoQuantizationConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == config


def test_unknown_keys_survive_a_round_trip(example: Example) -> None:
    config = AutoQuantizationConfig.from_dict({**example.config_dict, **UNKNOWN_KEY})
    again = AutoQuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict().items() >= UNKNOWN_KEY.items()
    assert again == config


def test_example_configs_differ(backend: Backend) -> None:
    dicts = [{**each, "quant_method": backend.method} for each in backend.example_configs]
    configs = [AutoQuantizationConfig.from_dict(each) for each in dicts]
    assert [(first, second) for first, second in itertools.combinations(configs, 2) if first == second] == []


def test_parsing_leaves_the_dict_as_it_was(example: Example) -> None:
    given = copy.deepcopy(dict(example.config_dict))
    AutoQuantizationConfig.from_dict(given)
    assert given == example.config_dict


def test_dict_of_a_config_shares_nothing_with_it(example: Example) -> None:
    config = example.config()
    before = config.to_json_string(use_diff=False)
    _empty_everything(config.to_dict())
    assert config.to_json_string(use_diff=False) == before


def test_copied_config_is_equal(example: Example) -> None:
    assert copy.deepcopy(example.config()) == example.config()


def test_wrong_type_raises_an_error_that_names_the_field(example: Example) -> None:
    config = example.config()
    assert [fault for name, value in _misfits(config) if (fault := _fault_of_update(config, name, value))] == []


def test_number_that_is_not_finite_raises_an_error_that_names_the_field(example: Example) -> None:
    config = example.config()
    attempts = [(name, value) for name in _numbers(config) for value in (math.nan, math.inf)]
    assert [fault for name, value in attempts if (fault := _fault_of_update(config, name, value))] == []


def test_refused_update_leaves_the_config_as_it_was(example: Example) -> None:
    config = example.config()
    for name, value in _misfits(config):
        with contextlib.suppress(TypeError, ValueError):
            config.update(**{name: value})
    assert config == example.config()


@pytest.mark.parametrize("value", [None, "nf4", 4, ["quant_method"]], ids=repr)
def test_config_that_is_no_dict_raises_type_error(backend: Backend, value: Any) -> None:
    with pytest.raises(TypeError):
        import_string(backend.config).from_dict(value)


def _checked_fields(config: QuantizationConfigMixin) -> dict[str, Any]:
    """Annotation by field. A dtype field counts as one that takes None alone: no value of JUNK names a dtype."""
    hints = type_hints(type(config))
    fields = dataclasses.fields(config)
    found = {field.name: type(None) if field.metadata.get("dtype") else hints[field.name] for field in fields}
    return {name: annotation for name, annotation in found.items() if annotation is not Any}


def _misfits(config: QuantizationConfigMixin) -> list[tuple[str, Any]]:
    fields = _checked_fields(config).items()
    return [(name, value) for name, annotation in fields for value in JUNK if not matches_type(value, annotation)]


def _numbers(config: QuantizationConfigMixin) -> list[str]:
    fields = _checked_fields(config).items()
    return [name for name, annotation in fields if matches_type(1, annotation) or matches_type(1.0, annotation)]


def _fault_of_update(config: QuantizationConfigMixin, name: str, value: Any) -> str | None:
    """What is wrong when `update` takes the value, or refuses it without naming the field; None when all is well."""
    try:
        config.update(**{name: value})
    except (TypeError, ValueError) as error:
        return None if name in str(error) else f"{name}={value!r} gives an error that does not name it: {error}"
    return f"{name}={value!r} is accepted"


def _spelled(value: Any) -> str:
    return str(to_json_value(value)).removeprefix("torch.")


def _empty_everything(value: Any) -> None:
    for item in list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        _empty_everything(item)
    if isinstance(value, dict | list):
        value.clear()
