"""What each installed method does to the bundled model: bits, size, KL divergence and perplexity, never time.

A model is quantized, saved, loaded and measured beside the float one, in float32, on the first tokens of eval.txt.
Where a method of 4-bit floats rounds inputs too, its weights are measured once more with float inputs.

    python benchmarks/accuracy.py              measures all; each row is in benchmarks/results/accuracy.csv at once
    python benchmarks/accuracy.py --missing    only what is not in that file
    python benchmarks/accuracy.py --page       writes the tables of docs/accuracy.md from that file
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import quantcore as qc
from quantcore.evaluation.perplexity import Comparison, compare
from quantcore.quantizers.auto import AutoHfQuantizer
from quantcore.quantizers.model import calibrates
from quantcore.workflows.evaluation import disk_bytes, encode

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "stdlib-lm"
RESULTS = ROOT / "benchmarks" / "results" / "accuracy.csv"
PAGE = ROOT / "docs" / "accuracy.md"
TOKENS = 20_480
SAMPLES, SEQLEN = 32, 256
DATA = {"calibration": MODEL / "calibration.txt", "tokenizer": MODEL, "samples": SAMPLES, "seqlen": SEQLEN}
ITERS = 50  # steps of AutoRound for a block; its own default is 200
HEAD = ["lm_head"]
TABLE = re.compile(r"(<!-- rows: (\w+) -->\n).*?(<!-- /rows -->)", re.DOTALL)
ALONE = "KL, float inputs"
COLUMNS = ("method", "settings", "bits", "MB", "inputs", "data", "KL", ALONE, "perplexity")


class Job(NamedTuple):
    group: str  # the table of the page that shows it beside its like
    method: str
    settings: str  # what tells it from the others of that method
    config: Mapping[str, Any]


class Row(NamedTuple):
    """What is stored of a job; every field as text."""

    group: str
    method: str
    settings: str
    bits: str  # a weight of the linear layers but the head, every stored byte counted; 16 where one stays float
    bytes: str  # of the files
    inputs: str  # "rounded" or "float"
    data: str  # "yes" where it was quantized with calibration data
    kl: str  # nats a token from the float model
    kl_weights: str  # of 4-bit floats the same with inputs left float; empty where they are
    perplexity: str


def torchao(name: str, **data: Any) -> dict[str, Any]:
    """The config of torchao's class of that name."""
    return {"quant_type": {"default": {"_type": name, "_version": 2, "_data": data}}}


def vptq(**settings: Any) -> dict[str, Any]:
    """The config of VPTQ with the same settings for each layer of a block."""
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return {"shared_layer_config": dict.fromkeys(layers, settings)}


def quark(**weight: Any) -> dict[str, Any]:
    """The config of Quark that rounds weights alone, in groups of inputs."""
    entry = {"qscheme": "per_group", "ch_axis": -1, **weight}
    return {"global_quant_config": {"input_tensors": None, "output_tensors": None, "bias": None, "weight": entry}}


def integers(bits: int) -> Iterator[Job]:
    """The methods of plain integers at a width, for groups of 64 and 128."""
    group, sym = ("four", True) if bits == 4 else ("low", False)
    affine = {"mode": "affine"} if bits == 3 else {}
    packing = {"packing_format": "auto_round"} if bits == 3 else {}
    yield Job(group, "sinq", f"{bits} bits, g64", {"nbits": bits, "group_size": 64, "modules_to_not_convert": HEAD})
    yield Job(group, "metal", f"{bits} bits, g64", {"bits": bits, "group_size": 64, **affine})
    for size in (64, 128):
        label, common = f"{bits} bits, g{size}", {"bits": bits, "group_size": size}
        yield Job(group, "hqq", label, {"nbits": bits, "group_size": size})
        yield Job(group, "gptq", label, {**common, "sym": sym})
        yield Job(group, "auto-round", label, {**common, **packing, "sym": sym, "iters": ITERS})
        if bits > 2:
            yield Job(group, "awq", label, common)


JOBS = (
    # 4-bit floats
    Job("floats", "nvfp4", "", {}),
    Job("floats", "modelopt", "NVFP4", {"quant_algo": "NVFP4"}),
    Job("floats", "compressed-tensors", "NVFP4A16", {"scheme": "NVFP4A16"}),
    Job("floats", "compressed-tensors", "NVFP4", {"scheme": "NVFP4"}),
    Job("floats", "compressed-tensors", "MXFP4A16", {"scheme": "MXFP4A16"}),
    Job("floats", "compressed-tensors", "MXFP4", {"scheme": "MXFP4"}),
    *(
        Job("floats", "fouroversix", f"nvfp4, {rule}", {"dtype": "nvfp4", "scale_rule": rule})
        for rule in ("mse", "mae", "abs_max", "static_6", "static_4")
    ),
    Job("floats", "fouroversix", "mxfp4, static_6", {"dtype": "mxfp4", "scale_rule": "static_6"}),
    *(
        Job(
            "floats",
            "fp_quant",
            f"{dtype}, {method}, {transform} {size}",
            {
                "forward_dtype": dtype,
                "forward_method": method,
                "transform_init": transform,
                "hadamard_group_size": size,
            },
        )
        for dtype, method, transform, size in (
            ("nvfp4", "abs_max", "identity", 16),
            ("nvfp4", "abs_max", "hadamard", 16),
            ("nvfp4", "abs_max", "hadamard", 128),
            ("mxfp4", "abs_max", "identity", 32),
            ("mxfp4", "abs_max", "hadamard", 32),
            ("mxfp4", "abs_max", "hadamard", 128),
            ("mxfp4", "quest", "hadamard", 32),
        )
    ),
    Job("floats", "mxfp4", "", {}),
    Job("floats", "gguf", "MXFP4", {"type": "MXFP4"}),
    Job("floats", "gguf", "NVFP4", {"type": "NVFP4"}),
    Job("floats", "quark", "fp4, g32", quark(dtype="fp4", group_size=32, scale_format="e8m0")),
    # 4 bits
    Job("four", "bitsandbytes", "nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    Job(
        "four",
        "bitsandbytes",
        "nf4, double",
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    Job("four", "bitsandbytes", "fp4", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
    Job("four", "compressed-tensors", "W4A16", {"scheme": "W4A16"}),
    Job("four", "compressed-tensors", "W4A16, solver gptq", {"scheme": "W4A16", "solver": "gptq"}),
    Job("four", "compressed-tensors", "W4A16_ASYM", {"scheme": "W4A16_ASYM"}),
    Job("four", "quanto", "int4", {"weights": "int4"}),
    Job("four", "gemma", "4 bits", {"num_bits": 4}),
    Job("four", "quark", "uint4, g32", quark(dtype="uint4", group_size=32, symmetric=False)),
    Job("four", "sinq", "nf4, g64", {"nbits": 4, "method": "sinq_nf4", "modules_to_not_convert": HEAD}),
    Job("four", "sinq", "asinq, 4 bits, g64", {"nbits": 4, "method": "asinq", "modules_to_not_convert": HEAD}),
    *(
        Job("four", "higgs", f"4 bits, p={p}, g{size}", {"bits": 4, "p": p, "group_size": size, "hadamard_size": size})
        for p, size in ((2, 128), (2, 256), (1, 64))
    ),
    Job("four", "spqr", "3 bits and outliers", {}),
    *integers(4),
    # 2 and 3 bits
    *integers(3),
    *integers(2),
    *(  # 3 bits need layers of a multiple of 512 outputs, which this model has none of
        Job("low", "higgs", f"2 bits, p=2, g{size}", {"bits": 2, "group_size": size, "hadamard_size": size})
        for size in (128, 256)
    ),
    Job("low", "aqlm", "2x8, g8", {"num_codebooks": 2, "nbits_per_codebook": 8, "in_group_size": 8}),
    Job("low", "aqlm", "3x8, g8", {"num_codebooks": 3, "nbits_per_codebook": 8, "in_group_size": 8}),
    Job(
        "low",
        "vptq",
        "v8, k256 + k256",
        vptq(vector_lens=[-1, 8], num_centroids=[-1, 256], num_res_centroids=[-1, 256]),
    ),
    Job("low", "vptq", "v8, k4096", vptq(vector_lens=[-1, 8], num_centroids=[-1, 4096])),
    Job("low", "vptq", "v4, k256", vptq(vector_lens=[-1, 4], num_centroids=[-1, 256])),
    Job("low", "quanto", "int2", {"weights": "int2"}),
    Job("low", "gemma", "2 bits", {"num_bits": 2}),
    *(
        Job(
            "four" if kind in ("Q4_0", "Q4_K", "IQ4_XS", "Q5_K") else "eight" if kind in ("Q6_K", "Q8_0") else "low",
            "gguf",
            kind + (", importance" if importance else ""),
            {"type": kind, "pure": True, "importance": importance},
        )
        for kind in ("Q2_K", "Q3_K", "Q4_0", "Q4_K", "IQ4_XS", "Q5_K", "Q6_K", "Q8_0")
        for importance in (False, True)
        if not importance or kind in ("Q2_K", "Q3_K", "Q4_K")
    ),
    # 6 and 8 bits
    Job("eight", "bitsandbytes", "int8", {"load_in_8bit": True}),
    Job("eight", "fp8", "blocks of 128", {"weight_block_size": [128, 128]}),
    Job("eight", "fbgemm_fp8", "", {}),
    Job("eight", "mxfp8", "", {}),
    Job("eight", "eetq", "", {}),
    Job("eight", "gemma", "8 bits", {"num_bits": 8}),
    Job("eight", "hqq", "8 bits, g128", {"nbits": 8, "group_size": 128}),
    Job("eight", "metal", "8 bits, g128", {"bits": 8, "group_size": 128}),
    Job("eight", "quanto", "int8", {"weights": "int8"}),
    Job("eight", "compressed-tensors", "W8A8", {"scheme": "W8A8"}),
    Job("eight", "compressed-tensors", "MXFP6A16", {"scheme": "MXFP6A16"}),
    Job("eight", "torchao", "Int8WeightOnly", torchao("Int8WeightOnlyConfig")),
)


def main() -> int:
    given = arguments()
    if given.page:
        write_page(read_rows())
        return 0
    rows = {(row.method, row.settings): row for row in read_rows()} if given.missing else {}
    installed = {info.method for info in qc.methods() if info.installed}
    jobs = [job for job in JOBS if job.method in installed and job[1:3] not in rows]
    if given.only:
        jobs = [job for job in jobs if job.method in given.only or job.group in given.only]
    jobs.sort(key=needs_data)  # the quick ones first
    distance, failures = Distance(), []
    rows["none", "bfloat16"] = float_row(distance)
    for number, job in enumerate(jobs):
        print(f"{number + 1} of {len(jobs)}: {job.method} {job.settings}", file=sys.stderr, flush=True)
        try:
            with tempfile.TemporaryDirectory() as folder:
                rows[job.method, job.settings] = measured(job, Path(folder, "model"), distance)
        except Exception as error:  # noqa: BLE001 - the others are still to be measured
            failures.append(f"{job.method} {job.settings}: {type(error).__name__}: {error}")
            print(failures[-1], file=sys.stderr, flush=True)
        write_rows([*rows.values()])
    print(*failures, f"{len(failures)} of {len(jobs)} failed", sep="\n", file=sys.stderr)
    return 1 if failures else 0


def measured(job: Job, folder: Path, distance: Distance) -> Row:
    """Quantizes the model, saves it into a new folder, and measures what is loaded from there."""
    torch.manual_seed(0)
    calibrated = needs_data(job)
    model = qc.quantize(qc.load(MODEL), {"quant_method": job.method, **job.config}, **(DATA if calibrated else {}))
    qc.save(model, folder, companions_from=MODEL)
    model = qc.load(folder, dtype="float32")
    layers = [module for module in model.modules() if isinstance(module, qc.nn.QuantizedLinear)]
    rounds_inputs = any(layer.format.weight_alone() is not layer.format for layer in layers)
    found, bits, alone = distance.of(model), bits_of(model), ""
    if rounds_inputs and job.group == "floats":  # the last that is asked of the model: it is float then
        alone = f"{distance.of(qc.dequantize(model, torch.float32)).kl_divergence:.5f}"
    return Row(
        group=job.group,
        method=job.method,
        settings=job.settings,
        bits=f"{bits:.3f}",
        bytes=str(disk_bytes(folder)),
        inputs="rounded" if rounds_inputs else "float",
        data="yes" if calibrated else "",
        kl=f"{found.kl_divergence:.5f}",
        kl_weights=alone,
        perplexity=f"{found.model.perplexity:.3f}",
    )


def bits_of(model: nn.Module) -> float:
    """Stored bits for a weight of the linear layers but the head; 16 for one that a method leaves float."""
    sizes = {}  # of each layer its bits and weights
    for name, layer in model.named_modules():
        if name not in HEAD and isinstance(layer, qc.nn.QuantizedLinear):
            sizes[name] = 8 * layer.quantized_weight.nbytes, layer.in_features * layer.out_features
        elif name not in HEAD and isinstance(layer, nn.Linear):
            sizes[name] = 16 * layer.weight.numel(), layer.weight.numel()
    return sum(bits for bits, _ in sizes.values()) / sum(weights for _, weights in sizes.values())


def float_row(distance: Distance) -> Row:
    """The model as it is."""
    found = distance.of(distance.original.model)
    size, perplexity = str(disk_bytes(MODEL)), f"{found.model.perplexity:.3f}"
    return Row("", "none", "bfloat16", "16.000", size, "float", "", f"{found.kl_divergence:.5f}", "", perplexity)


def needs_data(job: Job) -> bool:
    """Whether a method calibrates with what the job's config asks for."""
    quantizer = AutoHfQuantizer.from_config({"quant_method": job.method, **job.config}, pre_quantized=False)
    assert isinstance(quantizer, qc.WeightQuantizer)
    return calibrates(quantizer)


class Remembered(nn.Module):
    """The float model, which reads each batch once: every method is measured on the same ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.logits: dict[bytes, Tensor] = {}

    def forward(self, ids: Tensor) -> Tensor:
        key = ids.numpy().tobytes()
        if key not in self.logits:
            self.logits[key] = self.model(ids, use_cache=False).logits
        return self.logits[key]


class Distance:
    """Measures models beside the float one, on the first tokens of eval.txt."""

    def __init__(self) -> None:
        self.ids = encode(MODEL, (MODEL / "eval.txt").read_text(encoding="utf-8"))
        self.original = Remembered(qc.load(MODEL, dtype="float32"))

    def of(self, model: nn.Module) -> Comparison:
        return compare(model, self.original, self.ids, max_tokens=TOKENS)


def read_rows() -> list[Row]:
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="", encoding="utf-8") as file:
        return [Row(**entry) for entry in csv.DictReader(file)]


def write_rows(rows: Sequence[Row]) -> None:
    """Writes all rows anew, in order of their bits, so that a run that is cut off leaves what it measured."""
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(sorted(rows, key=lambda row: (float(row.bits), float(row.kl))))


def write_page(rows: Sequence[Row]) -> None:
    """Puts the table of each group, or of all, between the marks of the page."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(TABLE.sub(lambda match: f"{match[1]}{table(rows, match[2])}{match[3]}", page), encoding="utf-8")


def table(rows: Sequence[Row], group: str) -> str:
    """All rows in order of their bits; those of one group in order of their divergence, 4-bit floats with both."""
    chosen = [row for row in rows if group in ("all", row.group)]
    if group != "all":
        chosen.sort(key=lambda row: float(row.kl))
    columns = [name for name in COLUMNS if name != ALONE or group == "floats"]
    lines = [columns, ["---"] * len(columns), *([cells(row)[name] for name in columns] for row in chosen)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells(row: Row) -> dict[str, str]:
    """What stands in a line, by the name of its column."""
    return {
        "method": f"`{row.method}`",
        "settings": row.settings,
        "bits": f"{float(row.bits):.2f}",
        "MB": f"{int(row.bytes) / 1e6:.2f}",
        "inputs": row.inputs,
        "data": row.data,
        "KL": f"{float(row.kl):.4f}",
        ALONE: f"{float(row.kl_weights or row.kl):.4f}",
        "perplexity": row.perplexity,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", action="store_true", help="keep the rows of the file, and measure the others")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="methods or groups: floats, four, low, eight")
    parser.add_argument("--page", action="store_true", help="measure nothing; write the tables of docs/accuracy.md")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
