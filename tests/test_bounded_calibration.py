"""Calibration from file to file within a bound of memory: layers of a block in turns, the files of the whole block."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantcore
from quantcore.calibration.block import Block
from quantcore.calibration.statistics import Hessian
from quantcore.calibration.streamed import StreamedWeights

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "solver": "gptq",
    "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
}
CONFIGS = {
    "gptq": GPTQ,
    "gptq-order": {**GPTQ, "desc_act": True},
    "gptq-experts": {**GPTQ, "dynamic": {"-:.*self_attn.*": {}}},
    "compressed-tensors": COMPRESSED,
}
IDS = torch.arange(4 * 12).view(4, 12).mul(7).remainder(90)


def write(source: Path, target: Path, config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The files that are made; of config.json what is said of the quantization."""
    options = {"calibration": IDS, "batch_size": 2, "max_shard_size": "60KB", **settings}
    quantcore.quantize_checkpoint(source, target, dict(config), **options)
    files: dict[str, Any] = {path.name: path.read_bytes() for path in sorted(target.iterdir())}
    return {**files, "config.json": json.loads(files["config.json"])["quantization_config"]}


def smallest(source: Path, target: Path, config: dict[str, Any]) -> int:
    """The bound that the error for one of a byte names."""
    with pytest.raises(ValueError, match=r"^max_memory 1: block model\.layers\.0 takes \d+ bytes at least") as caught:
        write(source, target, config, max_memory=1)
    found = re.search(r"give max_memory=(\d+) or more$", str(caught.value))
    assert found is not None
    return int(found[1])


@contextmanager
def watched() -> Iterator[tuple[list[tuple[str, ...]], list[int]]]:
    """A block in which it is noted which Hessians are measured at once, and the bytes of weights that modules hold."""
    collected: list[tuple[str, ...]] = []
    held: list[int] = []
    collect, put = Block.collect, StreamedWeights._put

    def noting(self: Block, names: Any, *args: Any, **kwargs: Any) -> Any:
        found = collect(self, names, *args, **kwargs)
        collected.extend([tuple(names)] if all(isinstance(each, Hessian) for each in found.values()) else [])
        return found

    def weighing(self: StreamedWeights, names: Any) -> None:
        put(self, names)
        linear = (module.weight for module in self._model.modules() if isinstance(module, nn.Linear))
        held.append(sum(weight.nbytes for weight in linear if isinstance(weight, Tensor) and not weight.is_meta))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Block, "collect", noting)
        patched.setattr(StreamedWeights, "_put", weighing)
        yield collected, held


@pytest.mark.parametrize("model", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_smallest_bound_gives_the_files_of_no_bound(
    config: dict[str, Any], model: str, save_float: Callable[[str], Path], tmp_path: Path
) -> None:
    source = save_float(model)
    expected = write(source, tmp_path / "whole", config)
    least = smallest(source, tmp_path / "made", config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "whole"]
    with pytest.raises(ValueError, match=f"give max_memory={least} or more"):
        write(source, tmp_path / "made", config, max_memory=least - 1)
    assert write(source, tmp_path / "made", config, max_memory=least) == expected


@pytest.mark.parametrize("model", ["llama", "mixtral"])
def test_weights_and_statistics_come_one_after_the_other(
    model: str, save_float: Callable[[str], Path], tmp_path: Path
) -> None:
    source = save_float(model)
    with watched() as (whole, all_weights):
        write(source, tmp_path / "whole", GPTQ)
    least = smallest(source, tmp_path / "made", GPTQ)
    with watched() as (parts, weights):
        write(source, tmp_path / "made", GPTQ, max_memory=least)
    assert {name for names in whole for name in names} == {name for names in parts for name in names}
    downs = [names for names in parts if names[0].endswith(("down_proj", "w2"))]
    assert [len(names) for names in downs] == [1] * len(downs)
    assert max(weights) < max(all_weights) / 2


def test_a_bound_that_holds_the_block_changes_nothing(save_float: Callable[[str], Path], tmp_path: Path) -> None:
    source = save_float("mixtral")
    with watched() as (whole, all_weights):
        expected = write(source, tmp_path / "whole", GPTQ)
    with watched() as (parts, weights):
        assert write(source, tmp_path / "made", GPTQ, max_memory="1GB") == expected
    assert (parts, weights) == (whole, all_weights)


def test_an_interrupted_run_goes_on_with_another_bound(save_float: Callable[[str], Path], tmp_path: Path) -> None:
    source = save_float("mixtral")
    expected = write(source, tmp_path / "whole", GPTQ)
    least = smallest(source, tmp_path / "made", GPTQ)
    replace = Block.replace

    def interrupted(self: Block, name: str, *args: Any, **kwargs: Any) -> None:
        if name == "model.layers.1.mlp.experts.2.w2":
            raise KeyboardInterrupt
        replace(self, name, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Block, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(source, tmp_path / "made", GPTQ, max_memory=least)
    assert write(source, tmp_path / "made", GPTQ, max_memory=2 * least) == expected


REFUSED = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "auto-round": {"quant_method": "auto-round", "bits": 4, "group_size": 32, "iters": 4},
    "gptq at once": {**GPTQ, "true_sequential": False},
}


@pytest.mark.parametrize("config", REFUSED.values(), ids=REFUSED)
def test_a_method_that_holds_whole_blocks_is_refused(
    config: dict[str, Any], save_float: Callable[[str], Path], tmp_path: Path
) -> None:
    source = save_float("llama")
    method = config["quant_method"]
    with pytest.raises(ValueError, match=f"max_memory '8GB': '?{method}.* holds a block as a whole"):
        write(source, tmp_path / "made", config, max_memory="8GB")
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_a_model_in_memory_is_refused(make_model: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="max_memory bounds calibration from file to file"):
        quantcore.quantize(make_model("llama"), dict(GPTQ), calibration=IDS, max_memory="8GB")
