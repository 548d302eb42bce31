"""The main job from a shell, on the bundled model: quantize, look, measure, with each backend."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from command import Result, cli
from safetensors.torch import load_file

import quantcore
from quantcore.cli import EXAMPLES, VERBS
from quantcore.distribution import install_hint
from quantcore.evaluation.perplexity import perplexity
from quantcore.plugins.backend import import_string
from quantcore.workflows.evaluation import encode

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "stdlib-lm"
TEXT = MODEL / "eval.txt"

# Flags of each method and the size of its result, as `formats` of the methods give it for this model: bits of a code,
# plus scales, plus what the layers say of themselves.
FLAGS = {
    "bitsandbytes": ["--load-in-4bit", "--bnb-4bit-quant-type", "nf4", "--bnb-4bit-use-double-quant"],
    "hqq": ["--nbits", "4", "--group-size", "64"],
}
BITS = {"bitsandbytes": (4.12, 4.3), "hqq": (4.5, 4.52)}


class Made(NamedTuple):
    """A quantized model: its method, its folder, what the command said."""

    method: str
    folder: Path
    result: Result


@pytest.fixture(scope="module", params=FLAGS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    method = request.param
    folder = tmp_path_factory.mktemp("out") / method
    return Made(method, folder, cli("quantize", MODEL, folder, "--method", method, *FLAGS[method], "--json"))


def test_quantize_succeeds_and_warns_of_nothing(made: Made) -> None:
    assert made.result.code == 0
    assert made.result.err.splitlines() == [
        f"reading {MODEL}",
        f"quantizing 42 layers with {made.method} into {made.folder}",
    ]


def test_dry_run_foresees_the_result(made: Made) -> None:
    foreseen = cli("quantize", MODEL, "--method", made.method, *FLAGS[made.method], "--dry-run", "--json").json
    found = made.result.json
    for key in ("config", "layers", "weights", "parameters", "bytes_before", "left", "formats"):
        assert foreseen[key] == found[key], key
    # Only the number of digits in a description of bitsandbytes cannot be foreseen.
    assert foreseen["bytes"] == pytest.approx(found["bytes"], abs=42 * 8)


def test_the_size_told_is_that_of_the_file(made: Made) -> None:
    stored = load_file(made.folder / "model.safetensors").values()
    low, high = BITS[made.method]
    assert made.result.json["bytes"] == sum(tensor.nbytes for tensor in stored)
    assert low <= made.result.json["bits_per_quantized_weight"] <= high


def test_the_result_loads_as_the_last_line_says(made: Made) -> None:
    model = quantcore.load(str(made.folder))
    with torch.inference_mode():
        logits = model(torch.arange(8)[None]).logits
    assert logits.shape == (1, 8, 2048)


def test_the_tokenizer_goes_along(made: Made) -> None:
    assert (made.folder / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()


def test_inspect_tells_what_quantize_told(made: Made) -> None:
    found, told = cli("inspect", made.folder, "--json").json, made.result.json
    layers = [row for row in found["modules"] if row["is_quantized"]]
    assert (found["method"], found["bytes"], found["weights"]) == (made.method, told["bytes"], told["parameters"])
    assert sum(row["bytes"] for row in layers) == told["quantized_bytes"]
    assert {row["format"] for row in layers} == set(told["formats"])


def test_inspect_knows_shapes_without_a_model(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    rows = {row["module"]: row for row in cli("inspect", made.folder, "--json").json["modules"]}
    assert rows["model.layers.3.mlp.down_proj"]["shape"] == [256, 768]


def test_inspect_as_text_has_a_row_for_each_module_and_the_totals(made: Made) -> None:
    out = cli("inspect", made.folder).out
    assert len(re.findall(r"^model\.layers\.\d+\.(?:mlp|self_attn)\.\w+_proj ", out, re.MULTILINE)) == 42
    assert re.search(r"^total +5,770,496 ", out, re.MULTILINE)


def test_eval_against_the_original(made: Made) -> None:
    args = ["--text", TEXT, "--reference", MODEL, "--max-tokens", "2048", "--dtype", "float32", "--json"]
    found = cli("eval", made.folder, *args).json
    assert found["tokens"] == 2048
    assert found["reference_perplexity"] < found["perplexity"] < 1.03 * found["reference_perplexity"]
    assert 0.001 < found["kl_divergence"] < 0.03
    assert 0.9 < found["top1_agreement"] < 0.99
    assert found["reference_disk_bytes"] == (MODEL / "model.safetensors").stat().st_size


def test_eval_as_text(made: Made) -> None:
    out = cli("eval", made.folder, "--text", TEXT, "--max-tokens", "256").out
    assert re.search(r"^model +\d+\.\d{3} +[\d,]+ +\d\.\d\d MB$", out, re.MULTILINE)
    assert out.endswith("over 256 tokens\n")


@pytest.mark.slow
def test_perplexity_is_the_published_one() -> None:
    model = quantcore.load(MODEL, dtype="float32")
    result = perplexity(model, encode(MODEL, TEXT.read_text(encoding="utf-8")))
    assert result.tokens == 40_960
    assert result.perplexity == pytest.approx(14.878, abs=0.0005)  # examples/stdlib-lm/README.md


# What goes wrong


def test_an_existing_output_is_kept(made: Made) -> None:
    result = cli("quantize", MODEL, made.folder, "--method", made.method)
    assert result.code == 1
    assert f"{made.folder} exists; choose another folder, or replace it with --force" in result.err


def test_a_quantized_input_is_refused(made: Made, tmp_path: Path) -> None:
    result = cli("quantize", made.folder, tmp_path / "out", "--method", "hqq")
    assert result.code == 1
    assert f"is quantized already, with {made.method}" in result.err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--method", "hqqq"], "'hqqq' is unknown; did you mean 'hqq'?"),
        (["--method", "hqq", "--group-sise", "64"], "no flag --group-sise; did you mean --group-size?"),
        (["--method", "hqq", "--nbits", "7"], "nbits must be one of 8, 6, 5, 4, 3, 2, 1.58, 1, got 7"),
        (["--method", "bitsandbytes", "--load-in-4bit", "--load-in-8bit"], "are both true; choose one"),
        (["--method", "bitsandbytes", "--bnb-4bit-quant-type", "nf5"], "'nf5' is not one of 'nf4', 'fp4'"),
        (["--method", "bitsandbytes", "--bnb-4bit-compute-dtype", "bf16"], "'bf16' is no torch dtype"),
    ],
    ids=["method", "flag", "value", "conflict", "choice", "dtype"],
)
def test_a_mistake_in_the_flags_is_a_usage_error(flags: list[str], expected: str, tmp_path: Path) -> None:
    result = cli("quantize", MODEL, tmp_path / "out", *flags)
    assert result.code == 2
    assert expected in result.err


def test_a_group_size_that_does_not_divide_names_the_layers_and_a_remedy(tmp_path: Path) -> None:
    result = cli("quantize", MODEL, tmp_path / "out", "--method", "hqq", "--group-size", "96")
    assert result.code == 1
    assert "model.layers.0.self_attn.q_proj, " in result.err
    assert "weight [256, 256] does not divide into groups of 96; use" in result.err
    assert not (tmp_path / "out").exists()


def test_missing_transformers_is_told_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = cli("quantize", MODEL, "--method", "hqq", "--dry-run")
    assert result.code == 1
    assert result.err.endswith(f"Error: this needs transformers; {install_hint('transformers')}\n")


def test_a_damaged_tokenizer_is_told(tmp_path: Path) -> None:
    folder = shutil.copytree(MODEL, tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"added_tokens": [{"id": 0}]}')
    result = cli("eval", folder, "--text", TEXT)
    assert result.code == 1
    assert result.err.endswith("holds no tokenizer that loads; copy the model's tokenizer there\n")


def test_a_dtype_that_torch_does_not_have_is_told(tmp_path: Path) -> None:
    folder = shutil.copytree(MODEL, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": "foo16"}))
    result = cli("eval", folder, "--text", TEXT)
    assert result.code == 1
    assert "config.json: dtype: 'foo16' is no torch dtype" in result.err


def test_a_checkpoint_without_tokenizer_is_told(made: Made, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(made.folder / name)
    result = cli("eval", tmp_path, "--text", TEXT)
    assert result.code == 1
    assert "holds no tokenizer that loads; copy the model's tokenizer there" in result.err


def test_an_empty_text_is_told(made: Made, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    result = cli("eval", made.folder, "--text", tmp_path / "empty")
    assert result.code == 1
    assert "a text of at least 2 tokens, got 0" in result.err


def test_a_text_in_another_encoding_is_told(made: Made, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("na\xefve".encode("latin-1"))
    result = cli("eval", made.folder, "--text", tmp_path / "latin")
    assert result.code == 1
    assert "is no UTF-8 text: byte 2 cannot be read" in result.err


# Bad input


def test_device_that_is_none_is_told_before_any_weight_is_read(tmp_path: Path) -> None:
    result = cli("quantize", MODEL, tmp_path / "out", "--method", "hqq", "--device", "nonsense")
    assert result.code == 2
    assert "'nonsense' is no device; write cpu, cuda:0 or auto" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "config.json: expected a JSON object, got list"),
        ("{", "config.json: not valid JSON"),
        ('{"model_type": "llama", "hidden_size": "many"}', "config.json is no config of transformers"),
        ('{"model_type": "llama", "quantization_config": [1]}', "quantization_config must be a dict, got list"),
    ],
    ids=["list", "broken", "field", "quantization"],
)
@pytest.mark.parametrize("verb", ["eval", "quantize"])
def test_config_json_that_is_none_is_one_error(verb: str, content: str, reason: str, tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text(content)
    flags = {"eval": ["--text", TEXT], "quantize": [tmp_path / "out", "--method", "hqq"]}
    result = cli(verb, tmp_path / "bad", *flags[verb])
    assert result.code == 1
    assert reason in result.err
    assert result.err.splitlines()[-1].startswith("Error: ")


def test_folder_whose_config_names_another_method_is_not_converted(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.folder, tmp_path / "bad")
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    result = cli("convert", tmp_path / "bad", tmp_path / "out", "--to", "awq")
    assert result.code == 1
    assert "no layer is stored by gptq, as quantization_config says" in result.err
    assert not (tmp_path / "out").exists()


# Comparing


def test_models_are_compared_with_the_first(made: Made, tmp_path: Path) -> None:
    short = ["--text", TEXT, "--max-tokens", "1024"]
    result = cli("compare", MODEL, made.folder, "--config", made.folder / "config.json", *short, "--json")
    assert result.code == 0, result.err
    first, stored, again = result.json
    assert [row["model"] for row in result.json] == [str(MODEL), str(made.folder), str(made.folder / "config.json")]
    assert (first["kl_divergence"], first["top1_agreement"]) == (0, 1)
    assert 0 < stored["kl_divergence"] < 0.05
    assert stored["perplexity"] == again["perplexity"]  # quantized in memory as it was into files
    assert again["disk_bytes"] <= stored["disk_bytes"] < 0.5 * first["disk_bytes"]
    alone = cli("eval", made.folder, "--reference", MODEL, *short, "--json").json
    assert {name: stored[name] for name in ("perplexity", "kl_divergence", "top1_agreement")} == {
        name: alone[name] for name in ("perplexity", "kl_divergence", "top1_agreement")
    }


def test_config_of_a_method_that_calibrates_is_not_compared(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quant_method": "gptq", "bits": 4}')
    result = cli("compare", MODEL, "--config", tmp_path / "config.json", "--text", TEXT)
    assert result.code == 2
    assert "gptq quantizes with data; make a folder with quantcore quantize and compare that" in result.err


def test_one_model_is_nothing_to_compare() -> None:
    result = cli("compare", MODEL, "--text", TEXT)
    assert result.code == 2
    assert "give a second folder, or --config" in result.err


# Help


def test_the_command_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quantcore.cli", "list", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, env=absolute_paths(), capture_output=True, text=True, check=True)
    assert {"bitsandbytes", "hqq"} <= set(done.stdout.split())


def test_every_example_of_the_help_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    of_verbs = [line for entry in VERBS.values() for line in import_string(entry.target).examples]
    for line in dict.fromkeys([*EXAMPLES, *of_verbs]):
        words = shlex.split(line)
        if words[1] in ("check", "serve"):  # which have sessions of their own
            continue
        short = ["--max-tokens", "512"] if words[1] in ("eval", "compare") else []
        short = ["--max-tokens", "4"] if words[1] == "run" else short
        assert cli(*words[1:], *short).code == 0, line


def absolute_paths() -> dict[str, str]:
    """This environment, with a PYTHONPATH that another folder can use."""
    search = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in search if path)}


def test_convert_to_a_method_by_name_alone_takes_its_default(made: Made, tmp_path: Path) -> None:
    done = cli("convert", made.folder, tmp_path / "out", "--to", "compressed-tensors", "--allow-lossy")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == 4
