"""Names that code written for transformers imports: configs from the package itself, and the tables of classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

import quantcore
from quantcore.plugins.discovery import methods
from quantcore.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from quantcore.quantizers.base import HfQuantizer
from quantcore.utils.quantization_config import CONFIG_CLASSES

ASK_EACH = """
import json, sys, quantcore
from quantcore.errors import BackendNotInstalledError
errors = {}
for name in sys.argv[1:]:
    try:
        getattr(quantcore, name)
    except BackendNotInstalledError as error:
        errors[name] = str(error)
print(json.dumps(errors))
"""
INSTALLED = sorted(info.method for info in methods() if info.installed)


@pytest.mark.parametrize("name", [name for name, method in CONFIG_CLASSES.items() if method in INSTALLED])
def test_config_of_an_installed_method_is_a_name_of_the_package(name: str) -> None:
    cls = getattr(quantcore, name)
    assert (cls.__name__, cls) == (name, AUTO_QUANTIZATION_CONFIG_MAPPING[CONFIG_CLASSES[name]])
    assert name in dir(quantcore)


def test_config_of_an_absent_method_says_how_to_get_it() -> None:
    environment = {**os.environ, "QUANTCORE_DISABLE_PLUGINS": ",".join(CONFIG_CLASSES.values())}
    command = [sys.executable, "-c", ASK_EACH, *CONFIG_CLASSES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found.keys() == CONFIG_CLASSES.keys()
    for name, error in found.items():
        assert f"method '{CONFIG_CLASSES[name]}' is known but not installed; pip install" in error


def test_import_statement_works_as_in_transformers() -> None:
    from quantcore import BitsAndBytesConfig, GPTQConfig

    assert BitsAndBytesConfig(load_in_4bit=True).load_in_4bit
    assert GPTQConfig(bits=4).bits == 4


def test_name_that_is_none_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'NoSuchConfig'"):
        _ = quantcore.NoSuchConfig


@pytest.mark.parametrize(
    "mapping", [AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING], ids=["quantizers", "configs"]
)
def test_mapping_lists_what_is_installed_and_cannot_be_changed(mapping: Any) -> None:
    assert list(mapping) == sorted([*INSTALLED, "bitsandbytes_4bit", "bitsandbytes_8bit"])
    assert len(mapping) == len(list(mapping))
    assert "hqq" in mapping
    assert "no-such-method" not in mapping
    assert mapping.get("no-such-method") is None
    with pytest.raises(KeyError, match="is unknown"):
        mapping["no-such-method"]
    with pytest.raises(TypeError):
        mapping["hqq"] = int


@pytest.mark.parametrize("method", INSTALLED)
def test_mapping_gives_the_classes_of_each_method(method: str) -> None:
    assert issubclass(AUTO_QUANTIZER_MAPPING[method], HfQuantizer)
    assert issubclass(AUTO_QUANTIZATION_CONFIG_MAPPING[method], quantcore.QuantizationConfigMixin)


def test_mapping_knows_the_two_quantizers_of_bitsandbytes() -> None:
    four, eight = (AUTO_QUANTIZER_MAPPING[f"bitsandbytes_{bits}bit"] for bits in (4, 8))
    assert (four.__name__, eight.__name__) == ("Bnb4BitQuantizer", "Bnb8BitQuantizer")
    assert "bitsandbytes_4bit" in AUTO_QUANTIZER_MAPPING
    for name in ("bitsandbytes_4bit", "bitsandbytes_8bit"):
        assert AUTO_QUANTIZATION_CONFIG_MAPPING[name] is quantcore.BitsAndBytesConfig


def test_mapping_has_every_key_of_transformers() -> None:
    from transformers.quantizers import auto

    assert set(auto.AUTO_QUANTIZER_MAPPING) <= set(AUTO_QUANTIZER_MAPPING)
    assert set(auto.AUTO_QUANTIZATION_CONFIG_MAPPING) <= set(AUTO_QUANTIZATION_CONFIG_MAPPING)


def test_registered_class_is_in_the_mapping() -> None:
    from quantcore.quantizers.auto import unregister

    @quantcore.register_quantization_config("made-up")
    class MadeUp(quantcore.QuantizationConfigMixin):
        quant_method = "made-up"

    try:
        assert AUTO_QUANTIZATION_CONFIG_MAPPING["made-up"] is MadeUp
        assert "made-up" in list(AUTO_QUANTIZATION_CONFIG_MAPPING)
    finally:
        unregister("made-up")
