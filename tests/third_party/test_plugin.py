"""A stranger's plugin, installed from its wheel: found by its method's name, like the project's own."""

from __future__ import annotations

import pytest
import torch

import quantcore as qc


def test_installed_plugin_is_listed_with_its_distribution() -> None:
    found = {info.method: info.distributions for info in qc.methods() if info.installed}
    assert found["rowint8"] == ("quantcore-plugin-rowint8 0.1.0",)


def test_method_is_served_by_name(tmp_path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
    qc.quantize(model, "rowint8")
    qc.save(model, tmp_path / "out")
    again = qc.load(tmp_path / "out", lambda: torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8)))
    x = torch.randn(3, 64)
    assert torch.equal(again(x), model(x))


def test_option_of_the_config_is_checked_by_the_core() -> None:
    with pytest.raises(TypeError, match=r"RowInt8Config\.modules_to_not_convert"):
        qc.AutoQuantizationConfig.from_dict({"quant_method": "rowint8", "modules_to_not_convert": "lm_head"})
