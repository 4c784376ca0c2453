"""What the user sees of the findings: a line each, and all of them as JSON."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from hpc.checks.findings import Check, Finding, Measured

_LABELS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "fail": ("FAIL", "bold red")}
_CHECK_WIDTH = 11


class Report:
    """Prints findings as they come, and remembers them.

    Args:
        require: What has to work: a finding that lacks it fails.
        behind_mpirun: Open MPI's mpirun shows its ranks a terminal even where its own output goes
            to a file, so that nothing is to be concluded from it.
    """

    def __init__(self, *, require: frozenset[str], behind_mpirun: bool) -> None:
        no_terminal = behind_mpirun and "FORCE_COLOR" not in os.environ
        self._console = Console(force_terminal=False if no_terminal else None, highlight=False)
        self._require = require
        self._findings: list[Finding] = []
        self._measured: dict[str, list[dict[str, Any]]] = {}
        self._began = time.time()

    def title(self, text: str) -> None:
        """Print a first line."""
        self._console.print(text, style="bold", markup=False)

    def busy(self, check: str) -> None:
        """Tell someone who watches what is being looked at."""
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._console.print(f"looking at {check} ...", end="\r", style="dim", markup=False)

    def judge(self, check: Check, measured: Sequence[Measured]) -> None:
        """Print what a check finds, and keep the measurements that it was made from."""
        self._measured[check.name] = [asdict(one) for one in measured]
        for finding in check.findings(measured):
            self.tell(finding)

    def tell(self, finding: Finding) -> None:
        """Print a finding."""
        wanted = sorted(self._require & set(finding.lacks))
        if wanted and finding.level != "fail":
            text = f"{finding.text}; --require asks for {', '.join(wanted)}"
            finding = replace(finding, level="fail", text=text)
        self._findings.append(finding)
        self._print(finding)

    def end(self) -> int:
        """Print a summary and return the exit code: 1 if anything fails."""
        failed = [finding.check for finding in self._findings if finding.level == "fail"]
        counts = dict.fromkeys(_LABELS, 0)
        for finding in self._findings:
            counts[finding.level] += 1
        text = f"{counts['ok']} ok, {counts['note']} to note, {counts['fail']} failed"
        text += f": {', '.join(dict.fromkeys(failed))}" if failed else ""
        seconds = time.time() - self._began
        self._clear()
        style = "bold red" if failed else "bold green"
        self._console.print(Text(f"{text} ({seconds:.0f} s)", style), soft_wrap=True)
        return 1 if failed else 0

    def write(self, path: Path) -> None:
        """Write findings and measurements as JSON."""
        content = {
            "began": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._began)),
            "seconds": time.time() - self._began,
            "failed": any(finding.level == "fail" for finding in self._findings),
            "findings": [asdict(finding) for finding in self._findings],
            "measured": self._measured,
        }
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _print(self, finding: Finding) -> None:
        self._clear()
        label, style = _LABELS[finding.level]
        text = finding.text + (f" -> {finding.advice}" if finding.advice else "")
        if not self._console.is_terminal:
            line = f"{label:<4}  {finding.check:<{_CHECK_WIDTH}} {text}"
            self._console.print(line, soft_wrap=True, markup=False)
            return
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_column(width=5)
        row.add_column(width=_CHECK_WIDTH)
        row.add_column(overflow="fold")
        row.add_row(Text(label, style), Text(finding.check), Text(text))
        self._console.print(row)

    def _clear(self) -> None:
        """Wipe away what `busy` has written."""
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            wipe = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))
            self._console.control(wipe)
