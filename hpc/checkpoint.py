"""Checkpoints: one directory per step, whole or absent, readable by name, without pickle.

`RUN/checkpoints/step-00001000/` holds

- `weights.safetensors`: float32 parameters by name;
- `optimizer.safetensors`: float32 moments, `exp_avg.<parameter>` and so on;
- `state.json`: step, cursors of all streams, counters, model and record set;
- `recipe.json`: the resolved recipe;
- `lanes-000004.safetensors`: of a Transformer-XL, what the lanes of streams from 4 on remember, or
  their last tokens, written by the rank that owned them (`hpc/lane_memory.py`);
- `checkpoint.json`: format, and size and xxh3-128 of each of the others, written last.

A checkpoint is written under a temporary name and renamed when it is whole and on disk.
"""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file

from hpc.engines import Moments
from preprocessing.errors import InputError
from preprocessing.files import sync

FORMAT = "prothpc-checkpoint"
VERSION = 1
INDEX = "checkpoint.json"
FILES = WEIGHTS, OPTIMIZER, STATE, RECIPE = (
    "weights.safetensors",
    "optimizer.safetensors",
    "state.json",
    "recipe.json",
)


@dataclass(frozen=True)
class FileFacts:
    """What the index says of a file."""

    bytes: int
    xxh3_128: int


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to go on, but the files that other ranks write."""

    step: int
    weights: dict[str, torch.Tensor]
    moments: Moments
    state: dict[str, Any]
    recipe: dict[str, Any]
    lanes: dict[str, FileFacts] = field(default_factory=dict)
    """Files that are in the unfinished directory already."""


class CheckpointWriter:
    """Saves checkpoints of one run in a background thread, and prunes old ones.

    Args:
        run_dir: directory of the run.
        keep: newest checkpoints kept; 0 keeps all.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self._root = checkpoints_of(run_dir)
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        self.seconds = 0.0
        """How long the slowest save took."""

    def begin(self, step: int) -> Path:
        """Make the unfinished directory of a checkpoint, for files that all ranks write.

        Raises:
            InputError: if an earlier save failed, or the directory cannot be made.
        """
        self.wait()
        try:
            return _begin(self._root, step)
        except OSError as error:
            raise InputError(f"the checkpoint of step {step} cannot be written: {error}") from error

    def save(self, checkpoint: Checkpoint) -> None:
        """Copy the tensors to host memory and write them while training goes on.

        Raises:
            InputError: if an earlier save failed.
        """
        self.wait()
        copied = Checkpoint(
            step=checkpoint.step,
            weights=_to_host(checkpoint.weights),
            moments={kind: _to_host(tensors) for kind, tensors in checkpoint.moments.items()},
            state=checkpoint.state,
            recipe=checkpoint.recipe,
            lanes=checkpoint.lanes,
        )
        self._thread = threading.Thread(target=self._write, args=(copied,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            InputError: if it failed; earlier checkpoints are untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise InputError(
                f"the checkpoint could not be written: {error}; earlier ones in {self._root} are "
                "whole: free some space or mend the file system, and run the same command again"
            ) from error

    def _write(self, checkpoint: Checkpoint) -> None:
        began = time.monotonic()
        try:
            write_checkpoint(self._root, checkpoint)
            self._prune()
        except OSError as error:
            self._error = error
        except Exception as error:  # safetensors has its own error for a full disk
            self._error = OSError(str(error))
        self.seconds = max(self.seconds, time.monotonic() - began)

    def _prune(self) -> None:
        if self._keep:
            for path in list_checkpoints(self._root)[: -self._keep]:
                shutil.rmtree(path)


def checkpoints_of(run_dir: Path) -> Path:
    """Return the directory of a run's checkpoints."""
    return run_dir / "checkpoints"


def list_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoint directories in `root`, oldest step first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if re.fullmatch(r"step-\d{8,}", path.name))


def write_checkpoint(root: Path, checkpoint: Checkpoint) -> Path:
    """Write one checkpoint under `root` and return its directory.

    Raises:
        OSError: if the disk is full or refuses; what was there before is untouched.
    """
    final = root / f"step-{checkpoint.step:08d}"
    temporary = (
        _unfinished(root, checkpoint.step) if checkpoint.lanes else _begin(root, checkpoint.step)
    )
    moments = {
        f"{kind}.{name}": tensor
        for kind, tensors in checkpoint.moments.items()
        for name, tensor in tensors.items()
    }
    save_file(checkpoint.weights, temporary / WEIGHTS)
    save_file(moments, temporary / OPTIMIZER)
    _write_json(temporary / STATE, checkpoint.state)
    _write_json(temporary / RECIPE, checkpoint.recipe)
    facts = dict(checkpoint.lanes)
    for name in FILES:
        sync(temporary / name)
        facts[name] = facts_of(temporary / name)
    files = {
        name: {"bytes": each.bytes, "xxh3_128": f"{each.xxh3_128:032x}"}
        for name, each in facts.items()
    }
    index = {"format": FORMAT, "version": VERSION, "files": files}
    _write_json(temporary / INDEX, index)
    sync(temporary / INDEX)
    sync(temporary)
    shutil.rmtree(final, ignore_errors=True)  # a broken one of the same step
    temporary.rename(final)
    sync(root)
    return final


def check_checkpoint(path: Path) -> None:
    """Refuse a checkpoint that is not whole.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    index = _read_json(path / INDEX, path)
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        raise InputError(
            f"{path}: format {index.get('format')!r} version {index.get('version')!r}, but this "
            f"prothpc reads {FORMAT!r} version {VERSION}"
        )
    for name in FILES:
        check_file(path, name)
    for name in lane_files(path):
        _check_size(path, name, index["files"][name])


def check_file(path: Path, name: str) -> None:
    """Refuse a file of a checkpoint that is not as it was written.

    Raises:
        InputError: naming what is wrong with it.
    """
    expected = _read_json(path / INDEX, path).get("files", {}).get(name, {})
    _check_size(path, name, expected)
    if f"{facts_of(path / name).xxh3_128:032x}" != expected.get("xxh3_128"):
        raise InputError(f"{path}: {name} has a wrong checksum")


def lane_files(path: Path) -> list[str]:
    """Return the names of the files of lanes; the ranks that read them check their contents."""
    return sorted(_read_json(path / INDEX, path).get("files", {}).keys() - set(FILES))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that `check_checkpoint` found whole.

    Raises:
        InputError: if a file cannot be read.
    """
    moments: Moments = {}
    for name, tensor in load_file(path / OPTIMIZER).items():
        kind, _, parameter = name.partition(".")
        moments.setdefault(kind, {})[parameter] = tensor
    state = _read_json(path / STATE, path)
    return Checkpoint(
        step=state["step"],
        weights=load_file(path / WEIGHTS),
        moments=moments,
        state=state,
        recipe=_read_json(path / RECIPE, path),
    )


def newest_whole(root: Path, report: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint in `root` that is whole, or None if there is none at all.

    Args:
        root: directory of checkpoints.
        report: called with a sentence for each broken one passed over.

    Raises:
        InputError: if there are checkpoints and all are broken.
    """
    paths = list_checkpoints(root)
    for path in reversed(paths):
        try:
            check_checkpoint(path)
        except InputError as error:
            report(f"{error}: passing over this checkpoint")
        else:
            return path
    if paths:
        raise InputError(
            f"none of the {len(paths)} checkpoints in {root} is whole: restore one, or start "
            "again in another train.run_dir"
        )
    return None


def find_checkpoint(path: Path, report: Callable[[str], None]) -> Path:
    """Return a whole checkpoint given its own directory or that of its run.

    Raises:
        InputError: if there is none, or the one named is broken.
    """
    if (path / INDEX).is_file():
        check_checkpoint(path)
        return path
    for root in (checkpoints_of(path), path):
        newest = newest_whole(root, report)
        if newest is not None:
            return newest
    raise InputError(f"{path} is neither a checkpoint nor a run directory with checkpoints")


def _to_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }


def facts_of(path: Path) -> FileFacts:
    """Return the size and the hash of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return FileFacts(path.stat().st_size, digest.intdigest())


def _unfinished(root: Path, step: int) -> Path:
    return root / f".step-{step:08d}.tmp"


def _begin(root: Path, step: int) -> Path:
    temporary = _unfinished(root, step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def _check_size(path: Path, name: str, expected: Mapping[str, Any]) -> None:
    file = path / name
    if not file.is_file():
        raise InputError(f"{path}: {name} is missing")
    if file.stat().st_size != expected.get("bytes"):
        raise InputError(
            f"{path}: {name} has {file.stat().st_size} bytes instead of {expected.get('bytes')}"
        )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(path: Path, checkpoint: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{checkpoint}: {path.name} is missing") from error
    except ValueError as error:
        raise InputError(f"{checkpoint}: {path.name} is no JSON: {error}") from error
