"""Writes the table of methods in README.md, and docs/methods.md, from what is installed; `--check` only compares.

python docs/methods_table.py [--check]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import quantcore as qc
from quantcore.distribution import DISTRIBUTION
from quantcore.plugins import Backend
from quantcore.plugins.backend import PURPOSES, SERVERS, Refusal
from quantcore.plugins.manager import plugins

README = Path(__file__).parents[1] / "README.md"
GUIDE = Path(__file__).with_name("methods.md")
BLOCK = re.compile(r"(<!-- methods -->\n).*?(<!-- /methods -->)", re.DOTALL)
SHAPE = (4096, 4096)
HEAD = f"""# Which method

Made by `python docs/methods_table.py` of what each installed backend says of itself. Sizes count every stored byte,
metadata included, for a {SHAPE[0]} x {SHAPE[1]} weight. What a method does to your own model, `quantcore recommend` and
`quantcore compare` measure.

Begin with the purpose, then read the methods it names. "Data" are texts by which a method chooses what it rounds to;
without them, quantizing takes seconds and the model need not be in memory as a whole.
"""
WHO_READS = """
## Who reads what

"Tested" is run: with transformers by `nox -s interop` and `interop_calibrated`, with mlx, optimum-quanto and sinq by
`nox -s interop_packages`, with Model Optimizer and fouroversix by `nox -s interop_fp4`, with vLLM by `nox -s vllm`
on a CPU. The package fp_quant runs on GPUs alone, and was not run. "By the source" is read in the source of that
version. What stands after "not" is refused, here by `quantcore quantize --serve-with NAME`, which says what works
instead, and writes the names that the program reads where names are all that differs. An empty cell:
it is not known to be read.
"""
ASKED = {
    "inference": "To run a model in less memory",
    "fine-tuning": "To train adapters on top (LoRA trains on each method; these are the usual ones)",
    "serving": "For a server that reads the files",
    "smallest": "When only the size counts",
    "research": "To study, or to reproduce papers",
}


class Method(NamedTuple):
    backend: Backend
    package: str  # that installs it
    configs: tuple[tuple[str, str, str], ...]  # settings, bits per weight, family

    @property
    def bits(self) -> str:
        found = sorted({float(bits) for _, bits, _ in self.configs})
        return f"{found[0]:.2f}" if len(found) == 1 else f"{found[0]:.2f} to {found[-1]:.2f}"

    @property
    def data(self) -> str:
        return "yes" if self.backend.needs_calibration else "no"

    @property
    def reason(self) -> str:
        return self.backend.guide.pros or self.backend.summary


def installed() -> Iterator[Method]:
    for info in qc.methods():
        if info.installed:
            package = f"`{DISTRIBUTION}[{info.extra}]`" if info.extra else info.distributions[0]
            backend = plugins().backend(info.method)
            yield Method(backend, package, tuple(configs(backend)))


def configs(backend: Backend) -> Iterator[tuple[str, str, str]]:
    """Each declared example config: its settings, its bits per weight, its family."""
    with torch.device("meta"):
        linear = nn.Linear(SHAPE[1], SHAPE[0], bias=False, dtype=torch.bfloat16)
    for example in backend.example_configs:
        quantizer = qc.AutoHfQuantizer.from_config({**example, "quant_method": backend.method}, pre_quantized=True)
        assert isinstance(quantizer, qc.WeightQuantizer)
        weight_format = quantizer.format_for("model.layers.0.self_attn.q_proj", linear)
        assert weight_format is not None
        settings = ", ".join(f"`{key}={_brief(value)}`" for key, value in example.items()) or "defaults"
        yield settings, f"{weight_format.bits_per_weight(SHAPE):.2f}", weight_format.family or ""


def front(methods: list[Method]) -> str:
    """One row for each method."""
    rows = ((_linked(each), each.package, each.bits, each.data, each.reason) for each in methods)
    return _table(("method", "install", "bits per weight", "data", "what speaks for it"), rows)


def _linked(method: Method) -> str:
    name = method.backend.method
    return f"[`{name}`](docs/methods.md#{name})"


def guide(methods: list[Method]) -> str:
    """The methods by purpose, and then a screen for each."""
    return HEAD + _by_purpose(methods) + _who_reads(methods) + "".join(map(_section, methods))


def _who_reads(methods: list[Method]) -> str:
    """A row for each method, a column for each program."""
    guides = {each.backend.method: each.backend.guide for each in methods}
    others = sorted({name for known in guides.values() for name in known.served_by} - set(SERVERS))
    rows = []
    for method, known in guides.items():
        cells = [_cell(known.served_by.get(name, ""), _refused(known.refused, name)) for name in (*SERVERS, *others)]
        rows.append((f"[{method}](#{method})", *cells))
    return WHO_READS + "\n" + _table(("method", *SERVERS, *others), rows)


def _cell(how: str, refused: list[str]) -> str:
    return "; ".join(part for part in (how, f"not {', '.join(refused)}" if refused else "") if part)


def _refused(refusals: Iterable[Refusal], server: str) -> list[str]:
    """What a program refuses, but for names that are set by themselves."""
    found = []
    for refusal in refusals:
        if refusal.server == server and not refusal.renames:
            settings = (f"`{name}`{_among(values)}" for name, values in refusal.settings.items())
            lifted = (f"`{name}`{_among(values)}" for name, values in refusal.unless.items())
            unless = " and ".join(lifted)
            found.append(" with ".join(settings) + (f" unless {unless}" if unless else ""))
    return found


def _among(values: Any) -> str:
    return f" {' or '.join(map(str, values))}" if values else ""


def _by_purpose(methods: list[Method]) -> str:
    lines = []
    for purpose in PURPOSES:
        fitting = [each.backend.method for each in methods if purpose in each.backend.guide.purposes]
        links = ", ".join(f"[{method}](#{method})" for method in fitting)
        lines.append(f"- **{ASKED[purpose]}**: {links}.\n")
    return "\n" + "".join(lines)


def _section(method: Method) -> str:
    backend = method.backend
    known = backend.guide
    servers = "; ".join(f"{name} ({how})" for name, how in known.served_by.items())
    lines = [
        f"**For it**: {known.pros}",
        f"**Against it**: {known.cons}",
        f"**Needs data**: {method.data}. **Install**: {method.package}.",
        f"**Files are read by**: {servers}." if servers else "",
        f"**Described in**: {known.paper}" if known.paper else "",
    ]
    body = "\n".join(f"- {line}" for line in lines if line)
    table = _table(("config", "bits per weight", "family"), method.configs)
    return f"\n## {backend.method}\n\n{backend.summary[:1].upper()}{backend.summary[1:]}.\n\n{body}\n\n{table}"


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = (head, ("---",) * len(head), *rows)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _brief(value: Any) -> str:
    """A value as a table cell shows it: of nested settings what tells one example from another."""
    if not isinstance(value, dict):
        return str(value)
    if "_type" in value:
        return _brief_object(value)
    found = {key: inner for key, inner in value.items() if isinstance(inner, dict)}
    if found:
        return "; ".join(f"{key}: {_brief(inner)}" for key, inner in found.items())
    return " ".join(str(value[key]) for key in ("type", "num_bits", "dtype", "qscheme", "group_size") if value.get(key))


def _brief_object(value: dict[str, Any]) -> str:
    """An object of torchao: its class, and the settings by which examples differ."""
    data = value["_data"]
    if not isinstance(data, dict):
        return str(data)
    shown = {key: data[key] for key in ("weight_dtype", "group_size", "granularity", "mapping_type") if data.get(key)}
    last = {key: inner[-1] if isinstance(inner, list) else inner for key, inner in shown.items()}
    return " ".join((value["_type"], *(_brief(inner) for inner in last.values())))


def main() -> int:
    methods = list(installed())
    text = README.read_text()
    made = {
        README: BLOCK.sub(lambda match: f"{match[1]}{front(methods)}{match[2]}", text),
        GUIDE: guide(methods),
    }
    stale = [path.name for path, content in made.items() if not path.exists() or path.read_text() != content]
    if "--check" in sys.argv:
        if stale:
            print(f"{' and '.join(stale)}: out of date; run python docs/methods_table.py", file=sys.stderr)
        return int(bool(stale))
    for path, content in made.items():
        path.write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
