"""Checkpoints are whole or absent, prune themselves, and name what is broken."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from hpc.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    check_checkpoint,
    checkpoints_of,
    find_checkpoint,
    list_checkpoints,
    newest_whole,
    read_checkpoint,
    write_checkpoint,
)
from preprocessing.errors import InputError


def example(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weights = {name: torch.randn(3, 2, generator=generator) for name in ("a.weight", "b.bias")}
    moments = {
        kind: {name: torch.randn(3, 2, generator=generator) for name in weights}
        for kind in ("exp_avg", "exp_avg_sq")
    }
    state = {"step": step, "streams": [[1, 2], [3, 4]]}
    return Checkpoint(step, weights, moments, state, {"train": {"steps": 9}})


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = example(7)
    path = write_checkpoint(tmp_path, written)
    check_checkpoint(path)
    read = read_checkpoint(path)
    assert path.name == "step-00000007"
    assert (read.step, read.state, read.recipe) == (7, written.state, written.recipe)
    for name, tensor in written.weights.items():
        assert torch.equal(read.weights[name], tensor)
        for kind in written.moments:
            assert torch.equal(read.moments[kind][name], written.moments[kind][name])


def test_a_flipped_byte_in_any_file_is_found_and_the_file_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, example(1))
    for file in sorted(path.iterdir()):
        original = file.read_bytes()
        for offset in (0, len(original) // 2, len(original) - 2):
            flip(file, offset)
            with pytest.raises(InputError) as caught:
                check_checkpoint(path)
            if file.name != "checkpoint.json":
                assert f"{file.name} has a wrong checksum" in str(caught.value)
            file.write_bytes(original)
    check_checkpoint(path)


def test_missing_and_short_files_are_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, example(1))
    weights = path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"weights\.safetensors has \d+ bytes instead of"):
        check_checkpoint(path)
    weights.unlink()
    with pytest.raises(InputError, match=r"weights\.safetensors is missing"):
        check_checkpoint(path)


def test_resume_falls_back_past_a_broken_checkpoint(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write_checkpoint(tmp_path, example(step))
    flip(tmp_path / "step-00000015" / "optimizer.safetensors", -1)
    (tmp_path / "step-00000010" / "state.json").unlink()
    said: list[str] = []
    newest = newest_whole(tmp_path, said.append)
    assert newest == tmp_path / "step-00000005"
    assert ["step-00000015" in said[0], "step-00000010" in said[1], len(said)] == [True, True, 2]


def test_only_broken_checkpoints_are_an_error_and_none_is_not(tmp_path: Path) -> None:
    assert newest_whole(tmp_path, print) is None
    write_checkpoint(tmp_path, example(5))
    flip(tmp_path / "step-00000005" / "state.json", 3)
    with pytest.raises(InputError, match=r"none of the 1 checkpoints in .* is whole"):
        newest_whole(tmp_path, print)


def test_an_interrupted_write_leaves_no_checkpoint(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, example(5))
    shutil.copytree(path, tmp_path / ".step-00000006.tmp")  # as a kill before the rename leaves it
    assert newest_whole(tmp_path, print) == path
    write_checkpoint(tmp_path, example(6))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000005", "step-00000006"]


def test_the_writer_prunes_all_but_the_newest(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        writer.save(example(step))
    writer.wait()
    kept = list_checkpoints(checkpoints_of(tmp_path))
    assert [path.name for path in kept] == ["step-00000003", "step-00000004"]


def test_saving_copies_before_training_goes_on(tmp_path: Path) -> None:
    checkpoint = example(1)
    expected = checkpoint.weights["a.weight"].clone()
    writer = CheckpointWriter(tmp_path, keep=0)
    writer.save(checkpoint)
    checkpoint.weights["a.weight"].zero_()
    writer.wait()
    saved = read_checkpoint(find_checkpoint(tmp_path, print))
    assert torch.equal(saved.weights["a.weight"], expected)


def test_a_failed_save_is_reported_and_keeps_the_earlier_one(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=0)
    writer.save(example(1))
    writer.wait()
    blocked = checkpoints_of(tmp_path) / ".step-00000002.tmp"
    blocked.write_text("a file where the directory should be made")
    writer.save(example(2))
    with pytest.raises(InputError, match=r"could not be written: .* earlier ones .* are whole"):
        writer.wait()
    assert find_checkpoint(tmp_path, print).name == "step-00000001"


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, example(1))
    index = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps({**index, "version": 99}))
    with pytest.raises(InputError, match="version 99, but this prothpc reads"):
        check_checkpoint(path)


def test_a_directory_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a checkpoint nor a run directory"):
        find_checkpoint(tmp_path, print)
