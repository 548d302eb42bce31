"""The calibration engine: which blocks it finds, what layers see, and what it leaves behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_models import (
    TOKENS,
    WIDTH,
    Attention,
    Backwards,
    Experts,
    InPlace,
    Language,
    Mixture,
    Repeating,
    Scaled,
    Skipping,
    Translation,
    make,
    token_ids,
)
from tiny_calibrated import TinyCalibratedConfig, TinyCalibratedQuantizer
from tiny_int8 import TinyInt8
from torch import Tensor, nn

import quantcore
from quantcore.calibration import report_of
from quantcore.calibration.block import Block, Sample, join_samples
from quantcore.calibration.statistics import Hessian, MeanAbs
from quantcore.evaluation.layer_error import output_error
from quantcore.nn.replace import quantized_modules
from quantcore.quantizers.plan import PlannedLayer

pytestmark = pytest.mark.usefixtures("tiny_calibrated")

Solve = Callable[[Block], None]
CONFIG = {"quant_method": "tiny-calibrated"}


def calibrate(model: nn.Module, solve: Solve, *, source: Any = "quantized", data: Any = None, **settings: Any) -> None:
    """Run a solver over a model; layers that it leaves are rounded."""

    class Quantizer(TinyCalibratedQuantizer):
        def solve_block(self, block: Block) -> None:
            solve(block)
            for name in block.unfinished:
                block.round_to_nearest(name, "test")

    quantizer = Quantizer(
        TinyCalibratedConfig(block_name_to_quantize=settings.pop("blocks_name", None)), pre_quantized=False
    )
    quantizer.source = source
    quantizer.calibrate_model(model, quantcore.Calibration(token_ids() if data is None else data, **settings))


def steps(model: nn.Module, **settings: Any) -> list[tuple[str, list[str]]]:
    """Name and layers of each block that a solver is handed."""
    found: list[tuple[str, list[str]]] = []
    calibrate(model, lambda block: found.append((block.name, list(block.layers))), **settings)
    return found


def inputs_of(model: nn.Module, names: list[str], *inputs: Tensor, **keywords: Tensor) -> dict[str, Tensor]:
    """The inputs [tokens, K] of layers in one run of a model."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0].reshape(-1, WIDTH))
        )
        for name in names
    ]
    with torch.no_grad():
        model(*inputs, **keywords)
    for handle in handles:
        handle.remove()
    return seen


def hessians(found: dict[str, Tensor]) -> Solve:
    def solve(block: Block) -> None:
        statistics = block.collect(block.layers, lambda layer: Hessian(layer.dense.shape[1]))
        found.update({name: hessian.matrix() for name, hessian in statistics.items()})

    return solve


def assert_hessians(found: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
    for name, x in inputs.items():
        torch.testing.assert_close(found[name], 2 / len(x) * x.T @ x)  # summed in another order


# Which blocks there are


def test_steps_are_the_blocks_with_what_is_outside_before_and_after() -> None:
    found = steps(make(Language))
    assert [name for name, _ in found] == ["", "layers.0", "layers.1", "layers.2", ""]
    assert [found[0][1], found[-1][1]] == [["adapter"], ["head"]]


def test_encoder_and_decoder_are_two_lists_in_the_order_of_execution() -> None:
    data = [{"input_ids": token_ids(2), "target_ids": token_ids(2, 4)}]
    assert [name for name, _ in steps(make(Translation), data=data)] == [
        "encoder.0",
        "encoder.1",
        "decoder.0",
        "decoder.1",
    ]


def test_blocks_that_run_backwards_are_solved_backwards() -> None:
    assert [name for name, _ in steps(make(Backwards))] == ["layers.2", "layers.1", "layers.0"]


@pytest.mark.parametrize("kind", [Skipping, Repeating, InPlace])
def test_blocks_that_need_more_than_the_output_before_are_one_step(kind: type[nn.Module]) -> None:
    assert steps(make(kind)) == [("", ["layers.0.up", "layers.1.up", "layers.2.up"])]


def test_a_model_without_a_list_of_blocks_is_one_step() -> None:
    model = nn.Sequential(nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
    assert steps(model) == [("", ["1", "2"])]


class Shared(Experts):
    """A block that gives each of its three experts another number of tokens."""

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, WIDTH)
        parts = flat.split([1, 2, len(flat) - 3])
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)]).view_as(hidden)


def test_experts_inside_of_blocks_are_no_blocks_of_their_own() -> None:
    model = make(Mixture)
    model.layers = nn.ModuleList(Shared() for _ in range(2))
    assert [name for name, _ in steps(model)] == ["layers.0", "layers.1"]


def test_named_list_of_blocks_is_the_only_one() -> None:
    data = [{"input_ids": token_ids(2), "target_ids": token_ids(2, 4)}]
    found = steps(make(Translation), data=data, blocks_name="decoder")
    assert [name for name, _ in found] == ["", "decoder.0", "decoder.1"]


def test_unknown_list_of_blocks_is_an_error_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="block_name_to_quantize 'h' is no list of blocks of the model; it has layers"):
        steps(make(Language), blocks_name="h")


# What layers see


@pytest.mark.parametrize("kind", [Language, Scaled, Backwards, Skipping, Mixture])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_layers_see_what_the_quantized_model_gives_them(kind: type[nn.Module], batch_size: int) -> None:
    model, found = make(kind), {}
    calibrate(model, hessians(found), batch_size=batch_size)
    # The layers of a block are measured before it is quantized, so only the first of a block see the final model.
    first = {Language: ["attention.q_proj"], Mixture: ["experts.0.up", "experts.1.up"]}.get(kind, ["up"])
    blocks = ["layers.0"] if kind is Skipping else [f"layers.{number}" for number in range(len(model.layers))]
    assert_hessians(found, inputs_of(model, [f"{block}.{name}" for block in blocks for name in first], token_ids()))


def test_decoder_sees_the_output_of_the_quantized_encoder() -> None:
    model, found = make(Translation), {}
    inputs = {"input_ids": token_ids(2), "target_ids": token_ids(2, 4)}
    calibrate(model, hessians(found), data=[inputs])
    names = ["encoder.1.up", "decoder.0.own", "decoder.0.other", "decoder.1.own", "decoder.1.other"]
    assert_hessians(found, inputs_of(model, names, **inputs))


def test_float_source_shows_every_layer_the_float_model() -> None:
    model, found = make(Language), {}
    expected = inputs_of(model, ["layers.0.attention.o_proj", "layers.2.up"], token_ids())
    calibrate(model, hessians(found), source="float")
    assert_hessians(found, expected)


def test_both_sources_give_float_targets_for_quantized_inputs() -> None:
    model, reference = make(Language), make(Language)
    outputs: dict[str, list[Tensor]] = {name: [] for name in ("layers.0", "layers.1", "layers.2")}
    for name, seen in outputs.items():
        reference.get_submodule(name).register_forward_hook(lambda _, args, output, seen=seen: seen.append(output[0]))
    with torch.no_grad():
        for rows in token_ids().split(2):
            reference(rows)
    targets: dict[str, list[Tensor]] = {}
    inputs: dict[str, list[Tensor]] = {}

    def solve(block: Block) -> None:
        if block.name:
            targets[block.name] = [sample.target for sample in block.samples]
            inputs[block.name] = [sample.args[0] for sample in block.samples]

    calibrate(model, solve, source="both", batch_size=2)
    for name, expected in outputs.items():
        torch.testing.assert_close(targets[name], expected, rtol=0, atol=0)
    assert torch.equal(inputs["layers.0"][0], reference.adapter(reference.embed(token_ids()[:2])))
    assert not torch.equal(inputs["layers.2"][0], outputs["layers.1"][0])


def test_stages_let_each_layer_see_the_finished_ones_before_it() -> None:
    model, found = make(Language), {}

    def solve(block: Block) -> None:
        for names in block.stages():
            statistics = block.collect(names, lambda layer: Hessian(layer.dense.shape[1]))
            found.update({name: hessian.matrix() for name, hessian in statistics.items()})
            for name in names:
                block.round_to_nearest(name, "test")

    calibrate(model, solve)
    names = [name for name, _ in quantized_modules(model) if name != "adapter"]
    assert_hessians(found, inputs_of(model, names, token_ids()))


def test_experts_of_a_block_are_one_stage_whether_reached_or_not() -> None:
    found: list[list[tuple[str, ...]]] = []
    calibrate(make(Mixture), lambda block: found.append(block.stages()))
    assert found[0] == [tuple(f"layers.0.experts.{number}.up" for number in range(3))]


def test_layers_with_the_very_same_input_share_one_statistic() -> None:
    shared: list[bool] = []

    def solve(block: Block) -> None:
        if block.name:
            found = block.collect(block.layers, lambda layer: Hessian(layer.dense.shape[1]))
            q, v, o = (found[f"{block.name}.attention.{name}_proj"] for name in "qvo")
            shared.append(q is v and q is not o)

    calibrate(make(Language), solve)
    assert shared == [True] * 3


def test_statistics_are_made_on_the_device_of_their_layer() -> None:
    found: list[torch.device] = []

    def made(layer: PlannedLayer) -> MeanAbs:
        found.append(torch.get_default_device())
        raise InterruptedError

    def solve(block: Block) -> None:
        block.trace()
        with torch.device("meta"), pytest.raises(InterruptedError):
            block.collect(block.layers, made)

    calibrate(make(Language), solve)
    assert set(found) == {torch.device("cpu")}


def test_masked_tokens_are_left_out() -> None:
    mask = torch.ones(5, 7, dtype=torch.int64)
    mask[1, 4:] = mask[3, :2] = 0
    model, found, tokens = make(Language), {}, []

    def solve(block: Block) -> None:
        statistics = block.collect(block.layers, lambda layer: Hessian(layer.dense.shape[1]))
        found.update({name: hessian.matrix() for name, hessian in statistics.items()})
        tokens.extend(hessian.tokens for hessian in statistics.values())

    calibrate(model, solve, data=[{"input_ids": token_ids(), "attention_mask": mask}])
    x = inputs_of(model, ["layers.1.attention.q_proj"], token_ids())["layers.1.attention.q_proj"]
    assert_hessians(found, {"layers.1.attention.q_proj": x[mask.bool().view(-1)]})
    assert set(tokens) == {30}


def test_a_pass_ends_after_the_last_layer_that_is_wanted() -> None:
    model, runs = make(Language), []
    model.layers[0].up.register_forward_hook(lambda *_: runs.append("up"))

    def solve(block: Block) -> None:
        if block.name == "layers.0":
            block.trace()
            runs.clear()
            block.collect(["layers.0.attention.q_proj"], lambda layer: MeanAbs(WIDTH))
            assert runs == []
            block.collect(["layers.0.attention.q_proj"], lambda layer: MeanAbs(WIDTH), stop_early=False)
            assert len(runs) == len(block.samples)

    calibrate(model, solve)


def test_trace_names_the_norm_that_feeds_a_group() -> None:
    traces = []
    calibrate(make(Language), lambda block: traces.append(block.trace()))
    first = traces[1].groups[0]
    assert first.layers == ("layers.0.attention.q_proj", "layers.0.attention.v_proj")
    assert first.source == "layers.0.norm"
    assert first.readers == ("layers.0.attention", *first.layers)
    assert traces[1].group_of("layers.0.up").source is None


def test_calls_give_arguments_and_output_of_a_module_for_each_sample() -> None:
    def solve(block: Block) -> None:
        if block.name != "layers.1":
            return
        calls = [found["layers.1.attention"] for found in block.calls(["layers.1.attention"])]
        assert len(calls) == len(block.samples) == 3
        attention = block.module.attention
        for call in calls:
            assert torch.equal(attention(*call.args, **call.kwargs), call.output)
            assert call.kwargs["angles"].eq(1).all()

    calibrate(make(Language), solve, batch_size=2)


def test_joined_samples_give_what_they_give_apart() -> None:
    def solve(block: Block) -> None:
        if block.name:
            apart = torch.cat([block.output(sample) for sample in block.samples[1:4]])
            joined = join_samples(block.samples[1:4])
            assert joined.kwargs["angles"] is block.samples[0].kwargs["angles"]  # the table that all share
            torch.testing.assert_close(block.output(joined), apart)  # another order of summation

    calibrate(make(Language), solve, batch_size=1)


def test_join_keeps_masks_and_targets_in_step() -> None:
    first = Sample(0, (torch.zeros(1, 2),), {}, torch.tensor([[True, False]]), torch.zeros(1, 2))
    second = Sample(1, (torch.ones(1, 2),), {}, torch.tensor([[True, True]]), torch.ones(1, 2))
    joined = join_samples([first, second])
    assert joined.mask.tolist() == [[True, False], [True, True]]
    assert torch.equal(joined.target, joined.args[0])


# What it leaves behind


def test_whole_model_is_quantized_and_says_how() -> None:
    model = quantcore.quantize(make(Language), CONFIG, calibration=token_ids())
    report = report_of(model)
    assert [line.name for line in report.layers] == list(dict(quantized_modules(model)))
    assert (report.samples, report.tokens, report.fallbacks) == (5, 35, [])
    assert all(line.loss is not None and line.tokens == 35 and line.seconds >= 0 for line in report.layers)


def test_solver_beats_rounding_on_the_calibration_data() -> None:
    config = {**CONFIG, "top": 1}
    losses = {}
    for name, shrinks in (("solved", None), ("rounded", (1.0,))):
        model = make(Language)
        settings = {} if shrinks is None else {"shrinks": list(shrinks)}
        quantcore.quantize(model, {**config, **settings}, calibration=token_ids())
        losses[name] = report_of(model).layers[0].loss
    assert losses["solved"] < losses["rounded"]


def test_a_quantized_model_is_saved_and_loaded_without_data(tmp_path: Path) -> None:
    model = quantcore.quantize(make(Language), CONFIG, calibration=token_ids())
    quantcore.save(model, tmp_path / "saved")
    loaded = quantcore.load(tmp_path / "saved", lambda: make(Language))
    assert torch.equal(loaded(token_ids()), model(token_ids()))
    assert report_of(loaded) is None


@pytest.mark.parametrize("source", ["quantized", "float"])
def test_embeddings_that_a_method_quantizes_are_rounded(source: Any) -> None:
    class Quantizer(TinyCalibratedQuantizer):
        def embedding_format_for(self, name: str, module: nn.Module) -> TinyInt8:
            return TinyInt8()

    model, quantizer = make(Language), Quantizer(TinyCalibratedConfig(), pre_quantized=False)
    quantizer.source = source
    quantizer.calibrate_model(model, quantcore.Calibration(token_ids()))
    assert {"embed", "adapter", "head"} <= dict(quantized_modules(model)).keys()


def test_the_model_is_left_in_its_mode_and_without_hooks() -> None:
    model = make(Language).train()
    model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    calibrate(model, hessians({}))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("source", ["quantized", "both"])
def test_blocks_on_a_named_device_give_the_same_bits_and_go_back(source: str) -> None:
    results = []
    for device in (None, "cpu"):
        model = make(Language)
        calibrate(model, lambda block: None, source=source, device=device)
        results.append(model.state_dict())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


@pytest.mark.parametrize("source", ["quantized", "float", "both"])
def test_activations_in_files_give_the_same_bits(source: str, tmp_path: Path) -> None:
    results = []
    for offload in (None, tmp_path / "files"):
        model, found = make(Language), {}
        calibrate(model, hessians(found), source=source, batch_size=2, offload=offload)
        results.append({**model.state_dict(), **{f"H.{name}": matrix for name, matrix in found.items()}})
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
    assert list((tmp_path / "files").iterdir()) == []


def test_inputs_of_a_finished_block_are_let_go() -> None:
    kept: dict[str, list[Any]] = {}

    def solve(block: Block) -> None:
        if block.name == "layers.2":
            assert all(reference() is None for reference in kept["layers.0"])
        kept[block.name] = [weakref.ref(sample.args[0]) for sample in block.samples[1:]] if block.name else []

    calibrate(make(Language), solve, batch_size=1)
    assert len(kept["layers.0"]) == 4


def test_float_weights_of_a_finished_block_are_let_go() -> None:
    model = make(Language)
    weights = [weakref.ref(module.weight) for _, module in model.layers[0].named_modules() if type(module) is nn.Linear]

    def solve(block: Block) -> None:
        if block.name == "layers.1":
            assert len(weights) == 4
            assert all(reference() is None for reference in weights)

    calibrate(model, solve)


def test_a_bias_and_the_mode_of_a_layer_stay() -> None:
    model = make(Language)
    bias = model.adapter.bias.clone()
    quantcore.quantize(model, CONFIG, calibration=token_ids())
    assert torch.equal(model.adapter.bias, bias)
    assert not model.adapter.training


def test_progress_counts_blocks_and_weights() -> None:
    seen = []
    quantcore.quantize(make(Language), CONFIG, calibration=token_ids(), progress=seen.append)
    assert (seen[0].block, seen[0].blocks, seen[0].layer) == (1, 5, "adapter")
    assert seen[-1].weights == seen[-1].of_weights == sum(WIDTH * WIDTH for _ in range(13)) + WIDTH * TOKENS


# What goes wrong


def test_nan_in_activations_names_the_layer() -> None:
    model = make(Language)
    model.layers[1].norm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.q_proj: the inputs of this layer hold NaN or inf"):
        quantcore.quantize(model, CONFIG, calibration=token_ids())


def test_layers_without_tokens_or_with_zeros_alone_are_rounded_and_named() -> None:
    model = make(Mixture)
    model.embed.weight.data[:, 0].abs_()  # so that the first block's tokens all go to its second expert
    quantcore.quantize(model, CONFIG, calibration=token_ids())
    fallbacks = {line.name: line.reason for line in report_of(model).fallbacks}
    assert fallbacks["layers.0.experts.0.up"] == "0 tokens reached it, fewer than 1"
    assert fallbacks["layers.0.experts.2.up"] == "0 tokens reached it, fewer than 1"
    assert "layers.0.experts.1.up" not in fallbacks
    zero = make(Language)
    zero.adapter.weight.data.zero_(), zero.adapter.bias.data.zero_(), zero.layers[0].norm.bias.data.zero_()
    quantcore.quantize(zero, CONFIG, calibration=token_ids())
    reasons = {line.name: line.reason for line in report_of(zero).fallbacks}
    assert reasons["layers.0.attention.q_proj"] == "its inputs are zero in all 35 tokens"


def test_a_layer_that_the_solver_forgets_is_an_error_that_names_it() -> None:
    class Forgetful(TinyCalibratedQuantizer):
        def solve_block(self, block: Block) -> None:
            pass

    with pytest.raises(ValueError, match="its solver left adapter float"):
        Forgetful(TinyCalibratedConfig(), pre_quantized=False).calibrate_model(
            make(Language), quantcore.Calibration(token_ids())
        )


def test_a_layer_cannot_be_replaced_twice() -> None:
    def solve(block: Block) -> None:
        block.round_to_nearest("adapter", "test")
        with pytest.raises(ValueError, match="adapter is a QuantizedLinear: it was replaced already"):
            block.round_to_nearest("adapter", "test")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(make(Language), solve)


def test_tensors_stored_besides_reach_the_layer_however_it_is_solved() -> None:
    def solve(block: Block) -> None:
        (layer,) = block.layers.values()
        block.store_besides(layer.name, {"weight.scale": torch.full((layer.dense.shape[0], 1), 3.0)})
        block.round_to_nearest(layer.name, "test")
        assert bool((block.model.get_submodule(layer.name).stored["weight.scale"] == 3).all())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(make(Language), solve)


def test_statistics_of_a_foreign_layer_are_refused() -> None:
    def solve(block: Block) -> None:
        with pytest.raises(LookupError, match=r"layers\.0\.up: not in block '', which has adapter"):
            block.collect(["layers.0.up"], lambda layer: MeanAbs(WIDTH))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(make(Language), solve)


def test_missing_data_is_an_error_that_names_the_argument() -> None:
    with pytest.raises(ValueError, match="tiny-calibrated quantizes with calibration data; pass calibration="):
        quantcore.quantize(make(Language), CONFIG)


def test_data_of_the_config_serves_where_none_is_given() -> None:
    def letters(text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}

    config = {**CONFIG, "dataset": ["thequickbrownfox"]}
    model = quantcore.quantize(make(Language), config, tokenizer=letters, seqlen=4)
    assert report_of(model).tokens == 16
    model = quantcore.quantize(make(Language), config, calibration=token_ids(2))
    assert report_of(model).tokens == 14


@pytest.mark.usefixtures("tiny")
def test_data_for_a_method_that_takes_none_is_refused() -> None:
    with pytest.raises(ValueError, match="tiny-int8 takes no calibration data; leave it out"):
        quantcore.quantize(make(Language), {"quant_method": "tiny-int8"}, calibration=token_ids())
    with pytest.raises(ValueError, match="tiny-int8 takes no seqlen; leave it out"):
        quantcore.quantize(make(Language), {"quant_method": "tiny-int8"}, seqlen=3)


# What is not computed twice


def in_stages(found: dict[str, Tensor], between: Solve = lambda block: None) -> Solve:
    """A solver that goes stage by stage, and does something to the block after each."""

    def solve(block: Block) -> None:
        for names in block.stages():
            statistics = block.collect(names, lambda layer: Hessian(layer.dense.shape[1]))
            found.update({name: hessian.matrix() for name, hessian in statistics.items()})
            for name in names:
                block.round_to_nearest(name, "test")
            between(block)

    return solve


def damp_norm(block: Block) -> None:
    if block.name:
        block.module.norm.weight.mul_(0.9)


@pytest.mark.parametrize("offload", [False, True], ids=["memory", "files"])
@pytest.mark.parametrize("between", [lambda block: None, damp_norm], ids=["layers", "norms"])
def test_finished_modules_give_the_same_bits_without_running_again(
    between: Solve, offload: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for most in (0, 1 << 20):
        monkeypatch.setattr("quantcore.calibration.reuse._MOST_BYTES", most)
        model, found = make(Language), {}
        calibrate(model, in_stages(found, between), batch_size=2, offload=tmp_path if offload else None)
        results.append({**model.state_dict(), **{f"H.{name}": matrix for name, matrix in found.items()}})
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_attention_is_run_once_for_each_sample_after_its_inputs_are_solved() -> None:
    runs: list[int] = []

    class Counting(Attention):
        def forward(self, x: Tensor, angles: Tensor) -> Tensor:
            runs.append(len(x))
            return super().forward(x, angles)

    model = make(Language)
    for layer in model.layers:
        layer.attention.__class__ = Counting
    calibrate(model, in_stages({}), batch_size=1)
    # In each of the three blocks: once to find the blocks, once to trace what is before them, once to trace the block,
    # and for each of five samples twice: until the input of q and v, and with these finished until that of o.
    assert len(runs) == 3 * (1 + 1 + 1 + 2 * 5)


def test_finished_layers_are_dequantized_once_for_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    dequantize = TinyInt8.dequantize
    monkeypatch.setattr(TinyInt8, "dequantize", lambda *given: calls.append(given[2]) or dequantize(*given))
    model = make(Language)
    calibrate(model, lambda block: None, batch_size=1)
    in_blocks = [name for name, _ in quantized_modules(model) if name.startswith("layers.")]
    assert len(in_blocks) <= len(calls) < 5 * len(in_blocks)  # there are five samples


def test_layers_numbered_in_a_row_are_stages_of_their_own() -> None:
    class Row(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(TOKENS, WIDTH)
            row = [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)]
            self.layers = nn.ModuleList([nn.Sequential(*row)])

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.layers[0](self.embed(input_ids))

    found: list[list[tuple[str, ...]]] = []
    calibrate(make(Row), lambda block: found.append(block.stages()))
    assert found == [[("layers.0.0",), ("layers.0.2",)]]


# Single layers


@pytest.mark.parametrize("inputs", ["tensor", "list"])
def test_a_single_layer_is_solved_with_its_inputs(inputs: str) -> None:
    linear, x = make(Language).adapter, torch.rand(3, 9, WIDTH)
    before = linear.weight.clone()
    given = x if inputs == "tensor" else list(x)
    layer = quantcore.nn.QuantizedLinear.from_linear(linear, {**CONFIG, "top": 1}, name="a.b", calibration=given)
    rounded = quantcore.nn.QuantizedLinear.from_linear(linear, {**CONFIG, "top": 1, "shrinks": [1.0]}, calibration=x)
    errors = [output_error(linear.weight, each.dequantize(), x) for each in (layer, rounded)]
    assert errors[0] < errors[1]
    assert layer.name == "a.b"
    assert torch.equal(linear.weight, before)


def test_a_single_layer_of_another_method_takes_no_inputs() -> None:
    with pytest.raises(ValueError, match="a: the format TinyInt8 takes no calibration data; leave it out"):
        quantcore.nn.QuantizedLinear.from_linear(
            make(Language).adapter, TinyInt8(), name="a", calibration=torch.rand(2, WIDTH)
        )
