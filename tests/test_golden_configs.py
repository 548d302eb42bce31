"""Published configs: those of installed methods give upstream's fields and JSON, the others name what to install."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import quantcore
from quantcore.distribution import install_line
from quantcore.errors import BackendNotInstalledError
from quantcore.plugins.known import KNOWN_METHODS


def spell(value: Any) -> Any:
    """A value as the golden files have it: results of methods, dtypes by name."""
    value = value() if callable(value) else value
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


@pytest.fixture
def case(golden_config: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(golden_config.read_text(encoding="utf-8"))
    content["installed"] = content["expect"]["method"] in {
        info.method for info in quantcore.methods() if info.installed
    }
    return content


def check_fields(case: dict[str, Any]) -> None:
    config = quantcore.AutoQuantizationConfig.from_dict(case["config"])
    expected = case["expect"]
    assert type(config).__name__ == expected["class"]
    assert {name: spell(getattr(config, name)) for name in expected["fields"]} == expected["fields"]
    assert config.to_dict() == expected["to_dict"] | {key: case["config"][key] for key in case["dropped_by_upstream"]}


def check_refusal(case: dict[str, Any]) -> None:
    method = case["expect"]["method"]
    with pytest.raises(BackendNotInstalledError) as caught:
        quantcore.AutoQuantizationConfig.from_dict(case["config"])
    known = KNOWN_METHODS[method]
    assert (install_line(known.extra) if known.is_available else "not available yet") in str(caught.value)


def test_published_config_is_read_or_names_its_package(case: dict[str, Any]) -> None:
    check = check_fields if case["installed"] else check_refusal
    check(case)


def test_published_config_survives_a_round_trip(case: dict[str, Any]) -> None:
    read = quantcore.AutoQuantizationConfig.from_dict if case["installed"] else dict
    config = read(case["config"])
    written = config.to_dict() if case["installed"] else dict(config)
    assert read(json.loads(json.dumps(written))) == config


def test_golden_set_covers_the_installed_methods() -> None:
    installed = {info.method for info in quantcore.methods() if info.installed}
    assert {"bitsandbytes", "hqq"} <= installed
