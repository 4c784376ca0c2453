"""metrics.jsonl, the figures that a run leaves, read without torch."""

import json
from pathlib import Path

METRICS = "metrics.jsonl"


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return the lines of metrics.jsonl in order of steps.

    Where a run was killed and went on from an earlier checkpoint, a step's last line counts. A last
    line that a kill cut short is left out.
    """
    latest: dict[tuple[int, bool], dict[str, float]] = {}
    for text in (run_dir / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        latest[line["step"], "eval/loss" in line] = line
    return [latest[key] for key in sorted(latest)]
