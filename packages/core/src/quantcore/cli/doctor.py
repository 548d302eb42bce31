"""`quantcore doctor`: what is here, what works, and why not the rest."""

from __future__ import annotations

from typing import Any

import click

from quantcore.cli.group import Verb
from quantcore.cli.output import Output, aligned, heading, in_bytes, output_options, styled


@click.command("doctor", cls=Verb, examples=("quantcore doctor", "quantcore doctor --json"))
@output_options(brief="only what fails")
def command(output: Output) -> None:
    """Show versions, devices, the state of every backend, and which kernel serves which method.

    The exit status is 1 when a backend or another plugin fails to load.
    """
    from quantcore.cli.diagnosis import diagnose

    found = diagnose()
    failures = _failures(found)
    brief = "\n".join(f"{name}: {text}" for name, text in failures.items())
    output.result(found, lambda: _text(found), brief)
    if failures:
        raise click.exceptions.Exit(1)


def _failures(found: dict[str, Any]) -> dict[str, str]:
    failures = {row["method"]: row["failure"] for row in found["backends"] if row["failure"]}
    return {**failures, **found["failures"]}


def _text(found: dict[str, Any]) -> str:
    versions = [(name, version or "not installed") for name, version in found["versions"].items()]
    sections = {
        "Versions": aligned(versions),
        "Devices": aligned([_device(device) for device in found["devices"]]),
        "Disks": aligned([_disk(disk) for disk in found["disks"]]),
        "Backends": aligned([_backend(row) for row in found["backends"]]) or ["none is installed; see quantcore list"],
        "Other failures": [f"{name}: {text}" for name, text in found["failures"].items()],
        "Kernels": _kernels(found["kernels"]),
        "Environment": aligned(list(found["environment"].items())) or ["no variable is set that changes anything"],
    }
    return "\n\n".join(
        "\n".join([heading(title), *(f"  {line}" for line in lines)]) for title, lines in sections.items() if lines
    )


def _device(device: dict[str, Any]) -> tuple[str, ...]:
    total, free = device["memory_bytes"], device["free_bytes"]
    memory = "memory unknown" if total is None else in_bytes(total)
    memory += "" if free is None else f", {in_bytes(free)} free"
    used = f"{device['threads']} of {device['cores']} cores used" if device["threads"] else ""
    return device["device"], device["name"], device["capability"], memory, used


def _disk(disk: dict[str, Any]) -> tuple[str, ...]:
    free = f"{in_bytes(disk['free_bytes'])} free of {in_bytes(disk['total_bytes'])}"
    return disk["disk"], free, disk["folder"]


def _backend(row: dict[str, Any]) -> tuple[str, ...]:
    state = styled("ok", fg="green") if row["failure"] is None else f"{styled('fails', fg='red')}: {row['failure']}"
    return row["method"], row["provided_by"], state


def _kernels(rows: list[dict[str, Any]]) -> list[str]:
    """Which kernel serves which formats of a method, in as few lines as tell them apart; then why others do not."""
    answers: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        key = (row["method"], row["label"], row["device"], row["kernel"] or "none")
        answers.setdefault(key, []).append(str(row["M"]))
    groups: dict[tuple[str, ...], list[str]] = {}
    for (method, label, device, kernel), tokens in answers.items():
        groups.setdefault((method, device, " and ".join(tokens), kernel), []).append(label)
    lines = [
        (method, labels[0] if len(labels) == 1 else f"{len(labels)} formats", *rest)
        for (method, *rest), labels in groups.items()
    ]
    return [*aligned([("method", "format", "device", "tokens", "kernel"), *lines]), *_refusals(rows)] if lines else []


def _refusals(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each reason for which kernels are not chosen; --json has them for each format."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, reason in row["others"].items():
            reasons.setdefault(reason, {})[name] = None
    lines = [f"  {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return ["why not another, somewhere (--json says where):", *lines] if lines else []
