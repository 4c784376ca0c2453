"""Ask programs for their versions, with a limit on how long they may take."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

Answer = dict[str, str]
"""`path` of a program, and either its `output` or the `trouble` it had; empty where there is none.
"""


def ask(commands: Mapping[str, Sequence[str]], timeout: float) -> dict[str, Answer]:
    """Run commands side by side.

    Args:
        commands: Name → program and arguments; the program is looked for on PATH.
        timeout: Seconds that each may take.

    Returns:
        Name → answer.
    """
    with ThreadPoolExecutor(len(commands)) as pool:
        answers = pool.map(lambda command: _ask(command, timeout), commands.values())
        return dict(zip(commands, answers, strict=True))


def version_in(text: str) -> str:
    """Return the first thing in a text that looks like a version, or nothing."""
    found = re.search(r"\d+(?:\.\d+)+[\w.+-]*", text)
    return found[0] if found else ""


def _ask(command: Sequence[str], timeout: float) -> Answer:
    path = shutil.which(command[0])
    if path is None:
        return {}
    try:
        done = subprocess.run(
            [path, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"path": path, "trouble": f"no answer within {timeout:g} s"}
    except OSError as error:
        return {"path": path, "trouble": error.strerror or str(error)}
    if done.returncode == 0:
        return {"path": path, "output": done.stdout.strip()}
    if done.returncode < 0:
        return {"path": path, "trouble": f"killed by {signal.Signals(-done.returncode).name}"}
    words = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return {"path": path, "trouble": words[-1].strip() if words else f"exit {done.returncode}"}
