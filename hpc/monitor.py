"""What a run shows of itself: log lines, metrics.jsonl, TensorBoard, a progress bar."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hpc.metrics import METRICS


class Monitor:
    """Rank 0's reporter; on other ranks it is silent and writes nothing.

    Args:
        run_dir: where metrics.jsonl and TensorBoard's files go; both are appended to.
        steps: of the whole run, for the progress bar.
        first_step: steps done when this attempt began.
        active: whether this is rank 0.
        tensorboard: also write TensorBoard event files.
    """

    def __init__(
        self, run_dir: Path, *, steps: int, first_step: int, active: bool, tensorboard: bool
    ) -> None:
        self._active = active
        self._steps = steps
        self._first_step = first_step
        self._began = time.monotonic()
        self._board: Any = None
        self._progress: Progress | None = None
        if not active:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = (run_dir / METRICS).open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar = self._progress.add_task("", total=steps, completed=first_step)
            self._progress.start()

    def say(self, sentence: str) -> None:
        """Print one line."""
        if self._progress is not None:
            self._progress.console.print(sentence, markup=False, highlight=False, soft_wrap=True)
        elif self._active:
            print(sentence, flush=True)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._progress is not None:
            self._progress.update(self._bar, completed=step)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Append metrics of a step to metrics.jsonl and TensorBoard."""
        if not self._active:
            return
        line = {"step": step, "time": round(time.time(), 3), **metrics}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def training(self, step: int, metrics: dict[str, float]) -> None:
        """Record and show an interval of training."""
        self.record(step, metrics)
        left = (time.monotonic() - self._began) / (step - self._first_step) * (self._steps - step)
        line = (
            f"loss {metrics['train/loss']:.4f}  lr {metrics['train/lr']:.2e}  "
            f"|g| {metrics['train/grad_norm']:.2f}  "
            f"{_skipped(metrics)}"
            f"{metrics['train/tokens_per_second']:,.0f} tokens/s  "
            f"{_mfu(metrics)}"
            f"padding {metrics['train/padding']:.0%}  "
            f"data wait {metrics['train/data_wait']:.0%}  "
            f"memory {metrics['train/memory_gib']:.2f} GiB"
        )
        width = len(str(self._steps))
        self.say(f"step {step:{width}d}/{self._steps}  {line}  left {_duration(left)}")

    def close(self) -> None:
        """Flush and close everything."""
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()
        if self._active:
            self._metrics.close()


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far: allocated on a GPU, or resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    return kib / 2**20


def _skipped(metrics: dict[str, float]) -> str:
    skipped = metrics["train/skipped_steps"]
    return f"skipped {skipped:.0f}  " if skipped else ""


def _mfu(metrics: dict[str, float]) -> str:
    return f"MFU {metrics['train/mfu']:.1%}  " if "train/mfu" in metrics else ""


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
