"""`quantcore serve`: a model behind OpenAI's API, by the server of transformers."""

from __future__ import annotations

import contextlib
import socket

import click

from quantcore._optional import require
from quantcore.cli.completing import files
from quantcore.cli.folders import check_places
from quantcore.cli.group import Verb

EXAMPLES = (
    "quantcore serve stdlib-lm-hqq",
    "quantcore serve stdlib-lm-hqq --port 8080 --device cuda:0",
)
NEEDED = ("fastapi", "uvicorn", "openai")  # by transformers' server


@click.command("serve", cls=Verb, examples=EXAMPLES)
@click.argument("source", metavar="MODEL", shell_complete=files)
@click.option("--host", metavar="NAME", default="localhost", help="Where to listen [default: localhost, this machine]")
@click.option("--port", metavar="N", type=click.IntRange(1, 65535), default=8000, help="[default: 8000]")
@click.option("--device", metavar="NAME", default="cpu", help="Where to run: cpu, cuda:0, auto [default: cpu]")
def command(source: str, host: str, port: int, device: str) -> None:
    """Answer OpenAI's API with MODEL, a folder or a hub id, until Ctrl-C: `transformers serve` with quantized layers.

    /v1/completions continues a text; /v1/chat/completions needs a tokenizer with a chat template. Nobody is asked for
    a key: whoever reaches the port is answered.
    """
    check_places([source], device=device)
    for package in NEEDED:
        require(package, "serve")
    _check_free(host, port)
    from transformers.cli.serve import Serve

    from quantcore.checkpoints.read import resolve
    from quantcore.checkpoints.safetensors_folder import SafetensorsSource
    from quantcore.integrations.transformers import use

    path = resolve(source)
    if path.is_file():
        raise ValueError(f"{source} is one file; give a folder of safetensors files, or serve it with llama.cpp")
    click.echo(f"requests name the model {path}", err=True)
    with contextlib.closing(SafetensorsSource.opened(path)), use():  # opened first: what is pickled or damaged is told
        Serve(force_model=str(path), host=host, port=port, device=device)


def _check_free(host: str, port: int) -> None:
    """Raise OSError for an address that cannot be listened at, before a model is loaded."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror or error}; choose another --port") from error
