"""The switch that lets quantcore serve transformers: when it is on, for whom, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, modeling_utils
from transformers.quantizers import auto as stock

import quantcore
from quantcore.errors import BackendNotInstalledError, UnknownMethodError
from quantcore.integrations.transformers import disable, enable, use
from quantcore.nn.replace import quantized_modules
from quantcore.quantizers.auto import AutoQuantizationConfig

HQQ = {"quant_method": "hqq", "nbits": 4, "group_size": 64}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
IDS = torch.arange(12).view(2, 6) * 7 % 96


@pytest.fixture(autouse=True)
def _switched_off() -> Iterator[None]:
    yield
    disable()
    assert modeling_utils.get_hf_quantizer is stock.get_hf_quantizer


@pytest.fixture
def float_folder(make_model: Callable[[str], Any], tmp_path: Path) -> Path:
    make_model("llama").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def hqq_folder(make_model: Callable[[str], Any], tmp_path: Path) -> Path:
    quantcore.save(quantcore.quantize(make_model("llama"), HQQ), tmp_path / "hqq")
    return tmp_path / "hqq"


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def is_served() -> bool:
    """Whether a call made here and now is answered by quantcore: stock cannot take a config object of quantcore."""
    config = load_config()
    try:
        quantizer, _, _ = modeling_utils.get_hf_quantizer(config, AutoQuantizationConfig.from_dict(HQQ), None, True, {})
    except (ValueError, ImportError, RuntimeError):
        return False
    return type(quantizer).__module__.startswith("quantcore.")


def load_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig()


# On and off


def test_import_changes_nothing_of_transformers() -> None:
    code = (
        "import transformers.modeling_utils as m, transformers.quantizers.auto as a\n"
        "before = dict(vars(m)), dict(vars(a)), dict(a.AUTO_QUANTIZER_MAPPING)\n"
        "import quantcore, quantcore.integrations.transformers as q\n"
        "q.use, q.enable, q.build_model\n"
        "import quantcore.integrations.transformers.adapter\n"
        "assert before == (dict(vars(m)), dict(vars(a)), dict(a.AUTO_QUANTIZER_MAPPING))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=1800)


def test_served_inside_the_block_and_not_after_it() -> None:
    assert not is_served()
    with use():
        assert is_served()
    assert not is_served()


def test_block_is_left_by_an_exception_too() -> None:
    with pytest.raises(KeyError), use():
        raise KeyError("x")
    assert modeling_utils.get_hf_quantizer is stock.get_hf_quantizer


def test_inner_block_goes_before_the_outer_one() -> None:
    with use():
        with use(without=["hqq"]):
            assert not is_served()
        assert is_served()


def test_block_goes_before_enable() -> None:
    enable()
    with use(methods=["bitsandbytes"]):
        assert not is_served()
    assert is_served()


def test_enable_lasts_until_disable() -> None:
    enable()
    enable()
    assert is_served()
    disable()
    assert modeling_utils.get_hf_quantizer is stock.get_hf_quantizer
    disable()


def test_use_decorates_a_function() -> None:
    assert use()(is_served)()
    assert not is_served()


def test_block_counts_for_its_thread_alone() -> None:
    seen: dict[str, bool] = {}
    with use():
        thread = threading.Thread(target=lambda: seen.update(other=is_served()))
        thread.start()
        thread.join()
        seen["own"] = is_served()
    assert seen == {"other": False, "own": True}


def test_enable_counts_for_every_thread() -> None:
    seen: list[bool] = []
    enable()
    thread = threading.Thread(target=lambda: seen.append(is_served()))
    thread.start()
    thread.join()
    assert seen == [True]


def test_block_counts_for_its_task_alone() -> None:
    async def inside(entered: asyncio.Event, leave: asyncio.Event) -> bool:
        with use():
            entered.set()
            await leave.wait()
            return is_served()

    async def both() -> tuple[bool, bool]:
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(inside(entered, leave))
        await entered.wait()
        here = is_served()
        leave.set()
        return here, await task

    assert asyncio.run(both()) == (False, True)


def test_block_that_ends_first_leaves_an_open_one_in_force() -> None:
    started, ended = threading.Event(), threading.Event()

    def other() -> None:
        with use():
            started.set()
            ended.wait()

    thread = threading.Thread(target=other)
    with use():
        thread.start()
        started.wait()
    with use():
        ended.set()
        thread.join()
        assert is_served()


def test_wrapper_of_another_package_is_left_in_place() -> None:
    with use():
        ours = modeling_utils.get_hf_quantizer

        def wrapper(*args: Any) -> Any:
            return ours(*args)

        modeling_utils.get_hf_quantizer = wrapper
    try:
        assert modeling_utils.get_hf_quantizer is wrapper
        assert not is_served()
    finally:
        modeling_utils.get_hf_quantizer = stock.get_hf_quantizer


# Which methods


def test_left_out_method_is_left_to_transformers(float_folder: Path) -> None:
    with use(without=["hqq"]), pytest.raises(ValueError, match="left to transformers here"):
        load(float_folder, quantization_config=AutoQuantizationConfig.from_dict(HQQ))


def test_method_that_no_backend_provides_is_refused_at_once() -> None:
    with pytest.raises(UnknownMethodError, match="'nonesuch'"), use(methods=["nonesuch"]):
        pass
    assert modeling_utils.get_hf_quantizer is stock.get_hf_quantizer


def test_known_method_without_a_backend_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTCORE_DISABLE_PLUGINS", "vptq")
    from quantcore.plugins import manager

    manager.reset()
    try:
        with (
            pytest.raises(BackendNotInstalledError, match=r"pip install \./packages/backend-misc"),
            use(methods=["vptq"]),
        ):
            pass
    finally:
        monkeypatch.undo()
        manager.reset()


def test_one_name_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(TypeError, match="lists of names"), use(methods="hqq"):
        pass


def test_unknown_method_of_a_checkpoint_is_an_error_and_no_model(hqq_folder: Path) -> None:
    config = json.loads((hqq_folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "hqqq"
    (hqq_folder / "config.json").write_text(json.dumps(config))
    with use(), pytest.raises(UnknownMethodError, match="'hqqq' is unknown; did you mean 'hqq'"):
        load(hqq_folder)


# What is served


def test_checkpoint_whose_config_names_a_method_is_served(hqq_folder: Path) -> None:
    with use():
        model = load(hqq_folder)
    assert torch.equal(model(IDS).logits, quantcore.load(hqq_folder)(IDS).logits)


def stock_config() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**{key: value for key, value in NF4.items() if key != "quant_method"})


REQUESTS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "ours-hqq": (HQQ, lambda: AutoQuantizationConfig.from_dict(HQQ)),
    "ours-bitsandbytes": (NF4, lambda: AutoQuantizationConfig.from_dict(NF4)),
    "dict": (NF4, lambda: dict(NF4)),
    "stock": (NF4, stock_config),
}


@pytest.mark.parametrize(("config", "request_"), REQUESTS.values(), ids=REQUESTS)
def test_config_of_either_library_quantizes_the_same(
    config: dict[str, Any], request_: Callable[[], Any], float_folder: Path
) -> None:
    with use():
        model = load(float_folder, quantization_config=request_())
    expected = quantcore.quantize(quantcore.load(float_folder), config)
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_config_object_of_transformers_stays_on_the_model(float_folder: Path) -> None:
    with use():
        model = load(float_folder, quantization_config=stock_config())
    assert type(model.config.quantization_config) is type(stock_config())


def test_model_works_and_saves_when_the_switch_is_off(float_folder: Path, tmp_path: Path) -> None:
    with use():
        model = load(float_folder, quantization_config=AutoQuantizationConfig.from_dict(NF4))
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(quantcore.load(tmp_path / "out")(IDS).logits, model(IDS).logits)
    assert model.dequantize().model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_float_model_is_loaded_by_transformers_alone(float_folder: Path) -> None:
    expected = load(float_folder)
    with use():
        model = load(float_folder)
    assert not list(quantized_modules(model))
    assert not hasattr(model, "hf_quantizer")
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_config_of_another_method_than_the_checkpoints_is_refused(hqq_folder: Path) -> None:
    with use(), pytest.raises(ValueError, match="HqqConfig but a BitsAndBytesConfig was passed"):
        load(hqq_folder, quantization_config=AutoQuantizationConfig.from_dict(NF4))


def test_method_of_a_program_is_served_by_its_name(float_folder: Path) -> None:
    from quantcore.quantizers.auto import (
        config_class,
        quantizer_class,
        register_quantization_config,
        register_quantizer,
        unregister,
    )

    register_quantization_config("mine")(type("MineConfig", (config_class("hqq"),), {"quant_method": "mine"}))
    register_quantizer("mine")(quantizer_class(AutoQuantizationConfig.from_dict(HQQ)))
    try:
        with use(methods=["mine"]):
            model = load(float_folder, quantization_config={**HQQ, "quant_method": "mine"})
        assert model.config.to_dict()["quantization_config"]["quant_method"] == "mine"
        assert len(list(quantized_modules(model))) == 14
    finally:
        unregister("mine")


# What is not served


def test_float_models_may_be_split(float_folder: Path) -> None:
    with use():
        assert next(quantized_modules(load(float_folder, tp_plan="auto")), None) is None
