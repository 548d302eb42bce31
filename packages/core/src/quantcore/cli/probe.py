"""Asking every plugin that is installed in a process of its own, before doctor asks them in this one.

What a stranger's module does when it is imported cannot be bounded here: it may hang, end the process, or pretend that
the user interrupted it. One child asks all of them in turn; where it is lost, another goes on after the one to blame.

`python -m quantcore.cli.probe '[["quantcore", "hqq"], ...]'` is the child: a line of JSON before and after each.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO, Any

from quantcore.plugins import discovery
from quantcore.plugins.manager import plugins

SECONDS = 60.0  # for one plugin; the slowest of ours takes two
_START = 300.0  # for the child's own imports, on a machine with other work

Claim = tuple[str, str]  # an entry-point group, and the name of entry points in it


def claims() -> list[Claim]:
    """Every name that an installed distribution has in one of our groups."""
    return [(group, name) for group in discovery.GROUPS for name in discovery.providers(group)]


def lost(asked: Sequence[Claim], seconds: float | None = None) -> dict[Claim, str]:
    """The claims that cannot be asked in this process, each with what happens then; nothing is imported here."""
    found: dict[Claim, str] = {}
    remaining = list(asked)
    while remaining:
        done, reason = _ask(remaining, SECONDS if seconds is None else seconds)
        if reason is None:
            break
        found[remaining[done]] = reason
        remaining = remaining[done + 1 :]
    return found


def _ask(asked: Sequence[Claim], seconds: float) -> tuple[int, str | None]:
    """How many claims a child asked and came back from, and what became of it at the next; None: it asked all."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.Popen(
        [sys.executable, "-m", __name__, json.dumps(asked)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_forward, args=(child.stdout, lines), daemon=True).start()
    done, limit = 0, _START
    try:
        while done < len(asked):
            line = lines.get(timeout=limit)
            if line is None:
                return done, f"ends the process, with status {child.wait()}"
            answer, limit = json.loads(line), seconds
            if answer.get("failure"):
                return done, str(answer["failure"])
            done += "done" in answer
    except queue.Empty:
        return done, f"does not come back within {limit:.0f} s"
    finally:
        child.kill()
        child.wait()
    return done, None


def _forward(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _child(asked: Sequence[Claim]) -> None:
    from quantcore.cli.diagnosis import load_method

    for claim in asked:
        _tell(start=claim)
        group, name = claim
        try:
            if group == discovery.GROUP:
                load_method(name)
            else:
                plugins().try_claim(group, name)
        except BaseException as error:  # noqa: BLE001 - what would end the process of whoever asks
            _tell(failure=f"ends whatever imports it: {type(error).__name__} {error}".strip())
        else:
            _tell(done=claim)


def _tell(**answer: Any) -> None:
    _channel.write(json.dumps(answer) + "\n")
    _channel.flush()


def _own_channel() -> IO[str]:
    """Standard output, kept from what plugins print, which goes to standard error."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return channel


if __name__ == "__main__":
    _channel = _own_channel()
    _child([(group, name) for group, name in json.loads(sys.argv[1])])
