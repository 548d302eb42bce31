"""The advice that `quantcore recommend` shows: every config weighed against what is asked for, the rest measured."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from quantcore.checkpoints.sink import Outline
from quantcore.cli.candidates import command_line, neighbours, usual_data
from quantcore.cli.diagnosis import free_memory
from quantcore.cli.estimate import Sizes, file_bytes_of, sizes_of
from quantcore.cli.group import nearest
from quantcore.cli.methods import brief_settings, chosen_backend
from quantcore.cli.needs import Facts, Needs
from quantcore.cli.output import Output
from quantcore.cli.progress import progress_bar
from quantcore.cli.shortlist import FEWER_BITS, Advice, Candidate, ModelFacts, best_of_each, faster_of_near
from quantcore.errors import QuantcoreError
from quantcore.nn.experts import stacked_weights
from quantcore.plugins.backend import SERVERS, Backend
from quantcore.plugins.discovery import methods
from quantcore.plugins.manager import plugins
from quantcore.quantizers.auto import AutoQuantizationConfig
from quantcore.quantizers.calibrated import CalibratedQuantizer
from quantcore.workflows.quantize import FloatModel, PlannedQuantization, float_quantizer, open_float
from quantcore.workflows.sample import WEIGHTS, LayerSample, Measured, kind_of, record_inputs
from quantcore.workflows.throughput import UNKNOWN, Rate, Throughput

_TOLERABLE = 0.25  # error of the smallest that is called usable; 2-bit groups of 32 lose about 0.3, 3-bit ones 0.15
_FINALISTS = 6  # methods that are measured again, on more weights
_MORE = 4  # times as many
_ROWS, _SEQLEN = 4, 128  # of the text that the model reads
_LONGEST = 20.0  # seconds that solving a layer of the sample may take, about
_TIMED = 5  # methods whose kernels are timed
_MILLION = 1e6


def advise(
    source: str, directory: Path, wanted: tuple[str, ...], needs: Needs, text: str | None, output: Output
) -> Advice:
    """Every config of the wanted methods (of all that are installed, for none) weighed for a model and measured.

    text: what errors are weighed by, as --calibration names it. Of examples that the model refuses a note is left.
    """
    backends = [chosen_backend(name, "--method") for name in wanted or _installed()]
    _check_program(needs.program, backends)
    opened = open_float(directory)
    work = _Work(source, directory, opened, text, output)
    planned = list(work.planned(backends, needs))
    free = free_memory() or 0
    if needs.memory is None and free:
        needs = dataclasses.replace(needs, memory=free)
    fitting = _fitting(planned, needs)
    if not fitting and needs.is_usual:  # nothing is that small, and nobody asked for it
        needs = dataclasses.replace(needs, bits=None)
        fitting = _fitting(planned, needs)
    measured = work.measured(_worth_measuring(fitting, needs))
    judged = [_judged(each, needs) for each in measured]
    taken = work.refined([each for each in judged if not each.refusals], needs)
    taken = [dataclasses.replace(each, command=work.line(each, needs)) for each in _ranked(taken, needs)]
    useful = work.timed([each for each in taken if not each.is_useless])
    if needs.purpose == "inference":
        useful = faster_of_near(useful)
    refused = [_judged(each.candidate, needs) for each in planned if each not in fitting]
    useless = [_useless(each) for each in taken if each.is_useless]
    refused += [each for each in judged if each.refusals]
    return Advice(work.facts(), needs, free, useful, [*useless, *refused], work.float_rate())


@dataclass(frozen=True, eq=False)
class _Planned:
    candidate: Candidate
    plan: PlannedQuantization


class _Work:
    """One model under the configs of the installed methods."""

    def __init__(self, source: str, directory: Path, opened: FloatModel, text: str | None, output: Output) -> None:
        self._source, self._directory, self._opened, self._text, self._output = source, directory, opened, text, output
        self._inputs: dict[str, torch.Tensor] = {}
        self._samples: dict[int, LayerSample] = {}
        self._plans: dict[tuple[str, str], PlannedQuantization] = {}  # by method and config
        self._sizes: Sizes | None = None
        self._throughput = Throughput(opened)
        self._kind = str(opened.checkpoint.config.get("model_type") or "")

    def facts(self) -> ModelFacts:
        """What the model is, as far as some plan has shown."""
        skeleton, sizes = self._opened.skeleton, self._sizes
        experts = max((weight.shape[0] for _, weight in stacked_weights(skeleton)), default=0)
        size, parameters = (0, 0) if sizes is None else (sizes.bytes_before, sizes.parameters)
        return ModelFacts(type(skeleton).__name__, self._kind, parameters, size, experts)

    def planned(self, backends: Iterable[Backend], needs: Needs) -> Iterator[_Planned]:
        """Every config that the shapes allow, once for what is stored; of a method that is out, its examples."""
        configs, seen = list(_configs(backends, needs, self._kind)), set()
        with progress_bar(self._output) as update:
            for number, (backend, config, is_example) in enumerate(configs):
                update(number, len(configs), f"looking at {backend.method}")
                try:
                    found = self._plan(backend, config, is_example)
                except (QuantcoreError, ValueError, TypeError) as refusal:
                    if is_example:
                        first, *_ = str(refusal).splitlines()
                        self._output.note(f"left out: {backend.method} {brief_settings(config)}: {first}")
                    continue
                key = backend.method, repr([(each.name, each.weight_format) for each in found.plan.plan.layers])
                if key not in seen:
                    seen.add(key)
                    yield found

    def _plan(self, backend: Backend, config: Mapping[str, Any], is_example: bool) -> _Planned:
        full = AutoQuantizationConfig.from_dict({"quant_method": backend.method, **config})
        full.check_quantizes()
        quantizer = float_quantizer(full)
        plan = self._opened.planned(quantizer)
        self._sizes = sizes = sizes_of(plan)
        calibrates = isinstance(quantizer, CalibratedQuantizer) and quantizer.needs_data
        seconds = backend.guide.calibration_seconds * sizes.weights / _MILLION if calibrates else math.nan
        facts = Facts(
            backend=backend,
            architecture=self._kind,
            bits_per_weight=sizes.bits_per_quantized_weight,
            bytes=sizes.bytes,
            calibrates=calibrates,
            trains=quantizer.is_trainable,
            seconds=seconds or math.nan,
            config=full.to_dict(),
            file_bytes=file_bytes_of(plan, sizes, calibrates),
        )
        return _Planned(Candidate(facts, dict(config), facts.file_bytes, is_example=is_example), plan)

    def measured(self, planned: Iterable[_Planned]) -> list[Candidate]:
        """The candidates with their errors, by rounding."""
        if self._text is not None:
            self._output.note("reading the text with the float model")
            self._inputs = self._recorded()
        found, all_of_them = [], list(planned)
        with progress_bar(self._output) as update:
            for number, each in enumerate(all_of_them):
                update(number, len(all_of_them), f"measuring {each.candidate.method}")
                self._plans[_key(each.candidate)] = each.plan
                candidate = self._measure(each.candidate, WEIGHTS, solves=False)
                if candidate is not None:
                    found.append(candidate)
        return found

    def refined(self, candidates: list[Candidate], needs: Needs) -> list[Candidate]:
        """The same, the best of the first methods measured on more weights, and solved where inputs are known."""
        best = {each.method: each for each in reversed(_ranked(candidates, needs))}
        finalists = _ranked(best.values(), needs)[:_FINALISTS]
        again: dict[tuple[str, str], Candidate] = {}
        with progress_bar(self._output) as update:
            for number, each in enumerate(finalists):
                update(number, len(finalists), f"measuring {each.method} again")
                again[_key(each)] = self._measure(each, WEIGHTS * _MORE, solves=bool(self._inputs)) or each
        return [again.get(_key(each), each) for each in candidates]

    def timed(self, candidates: list[Candidate]) -> list[Candidate]:
        """The same, the first methods with what their linear layers would do on this machine."""
        first = best_of_each(candidates)[:_TIMED]
        rates: dict[tuple[str, str], Rate] = {}
        with progress_bar(self._output) as update:
            for number, each in enumerate(first):
                update(number, len(first), f"timing {each.method}")
                rates[_key(each)] = self._throughput.rate(self._plans[_key(each)].plan)
        return [dataclasses.replace(each, rate=rates.get(_key(each), each.rate)) for each in candidates]

    def float_rate(self) -> Rate:
        """What the linear layers of the float model do on this machine."""
        plan = next(iter(self._plans.values()), None)
        return UNKNOWN if plan is None else self._throughput.float_rate(plan.plan)

    def _measure(self, candidate: Candidate, size: int, solves: bool) -> Candidate | None:
        guide, planned = candidate.facts.backend.guide, self._plans[_key(candidate)]
        sample = self._samples.setdefault(size, LayerSample(self._opened, self._inputs, size))
        expected = guide.calibration_seconds * size / _MILLION
        solves = solves and expected <= _LONGEST and sample.solves_layers(planned.quantizer)
        try:
            found = sample.error(planned.quantizer, planned.plan, solves)
        except (QuantcoreError, ValueError, TypeError, LookupError, NotImplementedError) as error:
            first, *_ = str(error).splitlines() or [type(error).__name__]
            self._output.note(f"left out: {candidate.method} {brief_settings(candidate.config)}: {first}")
            return None
        gain = guide.calibration_gain if candidate.calibrates and not solves else 1.0
        of = "outputs" if self._inputs else "weights"
        words = f"Its error is that of rounding, {100 * found.error:.2f} % of {of}, times {gain:g} for calibration"
        facts = dataclasses.replace(candidate.facts, seconds=_seconds(candidate, planned, found))
        return dataclasses.replace(candidate, facts=facts, error=gain * found.error, measured=words if gain < 1 else "")

    def _recorded(self) -> dict[str, torch.Tensor]:
        """What the layers see of the user's text, of each kind those of the block in the middle."""
        from quantcore.calibration.data import Calibration, model_inputs
        from quantcore.integrations.transformers import load_tokenizer
        from quantcore.workflows.model import load

        model = load(self._directory)
        assert self._text is not None, "asked where there is one"
        data = Calibration(
            Path(self._text) if Path(self._text).is_file() else self._text,
            tokenizer=load_tokenizer(self._directory),
            samples=_ROWS,
            seqlen=_SEQLEN,
        )
        kinds: dict[str, list[str]] = {}
        for name, module in model.named_modules():
            if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.ndim == 2:
                kinds.setdefault(kind_of(name), []).append(name)
        middle = [names[len(names) // 2] for names in kinds.values()]
        return record_inputs(model, middle, model_inputs(data, model))

    def line(self, candidate: Candidate, needs: Needs) -> str:
        """The command that quantizes so."""
        guide = candidate.facts.backend.guide
        data = (self._text or usual_data(self._source)) if candidate.calibrates else None
        suffix = guide.file_suffix if needs.program in guide.served_by else ""
        if suffix:
            self._check_container(suffix)
        server = needs.program if needs.program in SERVERS else ""
        return command_line(self._source, candidate.method, candidate.config, data, suffix, server)

    def _check_container(self, suffix: str) -> None:
        """Raise ValueError where a container has no names for this architecture."""
        with tempfile.TemporaryDirectory() as folder:
            make = plugins().resolve_container(suffix, "sink")
            make(Path(folder, f"empty{suffix}"), Outline(config=self._opened.checkpoint.config))


def _installed() -> list[str]:
    return [info.method for info in methods() if info.installed]


def _check_program(program: str | None, backends: Iterable[Backend]) -> None:
    """Raise click.BadParameter for a program of which no method knows, before anything is measured."""
    known = sorted({*SERVERS, *(name for backend in backends for name in backend.guide.served_by)})
    if program is not None and program not in known:
        text = f"{program!r} is none of {', '.join(known)}{nearest(program, known)}"
        raise click.BadParameter(text, param_hint="--serve-with")


def _configs(backends: Iterable[Backend], needs: Needs, kind: str) -> Iterator[tuple[Backend, Mapping[str, Any], bool]]:
    """Configs to weigh, each with whether it is an example of its method, which ought to work."""
    for backend in backends:
        yield from ((backend, config, True) for config in backend.example_configs)
        if not needs.rules_out(backend, kind):
            yield from ((backend, config, False) for config in neighbours(backend))


def _key(candidate: Candidate) -> tuple[str, str]:
    return candidate.method, repr(candidate.config)


def _fitting(planned: Iterable[_Planned], needs: Needs) -> list[_Planned]:
    return [each for each in planned if not needs.refusals(each.candidate.facts)]


def _worth_measuring(fitting: list[_Planned], needs: Needs) -> list[_Planned]:
    """Of each method the configs that use what is allowed; all of them where the smallest is looked for."""
    if needs.purpose == "smallest":
        return fitting
    most: dict[str, float] = {}
    for each in fitting:
        method = each.candidate.method
        most[method] = max(most.get(method, 0.0), each.candidate.bits_per_weight)
    return [each for each in fitting if each.candidate.bits_per_weight >= FEWER_BITS * most[each.candidate.method]]


def _ranked(candidates: Iterable[Candidate], needs: Needs) -> list[Candidate]:
    """Best first: the smallest error, or the smallest of those that work."""
    if needs.purpose == "smallest":
        return sorted(candidates, key=lambda each: (each.error > _TOLERABLE, each.bytes, each.error))
    return sorted(candidates, key=lambda each: (each.error, each.bytes))


def _judged(candidate: Candidate, needs: Needs) -> Candidate:
    return dataclasses.replace(candidate, refusals=tuple(needs.refusals(candidate.facts)))


def _useless(candidate: Candidate) -> Candidate:
    reason = f"loses {100 * candidate.error:.0f} %: {candidate.remark}"
    return dataclasses.replace(candidate, refusals=(reason,))


def _seconds(candidate: Candidate, planned: PlannedQuantization, found: Measured) -> float:
    """What quantizing the whole model takes, about: by the method's own figure, or by what the sample took."""
    if candidate.calibrates or not found.weights:
        return candidate.seconds
    return found.seconds * planned.plan.quantized_weights / found.weights
