"""What a job will need is estimated well, and a disk that is too small is refused up front."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from preprocessing import space
from preprocessing.errors import InputError
from preprocessing.generate import dry_run, generate
from preprocessing.options import PreprocessOptions
from preprocessing.planning import default_shards
from preprocessing.sizes import show_size
from preprocessing.sources import Source, examine
from preprocessing.space import Estimate, check_room, estimate, find_rooms
from preprocessing.workspace import Workspace

Prothpc = Callable[..., Any]


def made(tmp_path: Path, inputs: list[Path], options: PreprocessOptions) -> tuple[int, int, int]:
    """Records, residues and bytes of shards that these options give."""
    manifest = generate(inputs, tmp_path / "set", options)
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    kept = manifest["totals"]["kept"]
    return kept["records"], kept["residues"], sum(shard["bytes"] for shard in shards)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 300},
        {"max_length": 256, "long": "split", "overlap": 100, "min_length": 50},
        {"compression": "zstd"},
        {"limit": 500},
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_estimate_is_near_what_is_made(
    tmp_path: Path, real_fasta: Path, options: dict[str, Any], packed: bool
) -> None:
    path = real_fasta
    if packed:
        path = tmp_path / "in.fasta.gz"
        path.write_bytes(gzip.compress(real_fasta.read_bytes(), 6))
    given = PreprocessOptions(dedup=False, shards=4, **options)
    guessed = estimate([examine(path)], given)
    records, residues, size = made(tmp_path, [path], given)
    tolerance = 0.25 if packed or "limit" in options else 0.1
    assert guessed.records == pytest.approx(records, rel=tolerance)
    assert guessed.residues == pytest.approx(residues, rel=tolerance)
    assert guessed.output_bytes == pytest.approx(size, rel=tolerance)
    assert guessed.spill_bytes > residues * (1 - tolerance)


def test_spills_need_what_was_estimated(
    tmp_path: Path, real_fasta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    finish = Workspace.finish

    def measure(workspace: Workspace, *arguments: Any) -> Any:
        sizes.append(sum(path.stat().st_size for path in workspace.spills.glob("run*")))
        return finish(workspace, *arguments)

    monkeypatch.setattr(Workspace, "finish", measure)
    generate([real_fasta], tmp_path / "set", PreprocessOptions())
    guessed = estimate([examine(real_fasta)], PreprocessOptions()).spill_bytes
    assert guessed == pytest.approx(sizes[0], rel=0.1)


NEEDS = Estimate(text_bytes=0, records=0, residues=0, spill_bytes=3000, output_bytes=2000)


def test_what_lies_there_is_not_needed_again(tmp_path: Path) -> None:
    output, spills = tmp_path / "set", tmp_path / "set" / ".work"
    [room] = find_rooms(output, spills, NEEDS)
    assert (room.directory, room.needed) == (tmp_path, 5000)
    assert room.free == shutil.disk_usage(tmp_path).free
    spills.mkdir(parents=True)
    (spills / "run").write_bytes(bytes(1000))
    (output / "shard").write_bytes(bytes(2500))
    [room] = find_rooms(output, spills, NEEDS)
    assert (room.directory, room.needed) == (output, 2000)


def test_two_disks_are_looked_at_each(tmp_path: Path) -> None:
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk")
    first, second = find_rooms(tmp_path / "set", Path("/dev/shm/prothpc-test"), NEEDS)
    assert (first.needed, second.needed) == (2000, 3000)
    check_room([first, second])


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with 20 kB free."""
    usage = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=20_000))
    monkeypatch.setattr(space, "shutil", usage)


@pytest.mark.usefixtures("full_disk")
def test_small_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text("".join(f">id{n}\n{'MKV' * 30}\n" for n in range(100)))
    options = PreprocessOptions()
    with pytest.raises(InputError, match=r"too small: about \d+\.\d kB are needed and 20\.0 kB"):
        generate([tmp_path / "in.fasta"], tmp_path / "set", options)
    text, rooms = dry_run([tmp_path / "in.fasta"], tmp_path / "set", options)
    assert "20.0 kB free" in text
    with pytest.raises(InputError, match="too small"):
        check_room(rooms)
    assert [path.name for path in tmp_path.iterdir()] == ["in.fasta"]


def test_finished_set_needs_no_room(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "in.fasta").write_text("".join(f">id{n}\n{'MKV' * 30}\n" for n in range(100)))
    generate([tmp_path / "in.fasta"], tmp_path / "set", PreprocessOptions())
    request.getfixturevalue("full_disk")
    generate([tmp_path / "in.fasta"], tmp_path / "set", PreprocessOptions())


def test_dry_run_says_what_would_be_done(
    prothpc: Prothpc, tmp_path: Path, real_fasta: Path, zipped_fasta: Path
) -> None:
    arguments = ["preprocess", real_fasta, zipped_fasta, "--holdout", "0.1", "--dry-run"]
    result = prothpc(*arguments, "--output", tmp_path / "set", ranks=2)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    sizes = {path.resolve(): path.stat().st_size for path in (real_fasta, zipped_fasta)}
    assert lines[0] == f"input files: 2 with {show_size(sum(sizes.values()))}"
    expected = [
        [kind, *show_size(size).split(), str(path)]
        for kind, (path, size) in zip(("plain", "gzip"), sizes.items(), strict=True)
    ]
    assert sorted(line.split() for line in lines[1:3]) == sorted(expected)
    assert "units of work for ranks: 2" in lines[3]
    assert lines[5] == "shards: 8 for training, 1 held out"
    assert lines[7].startswith(f"  on the disk of {tmp_path}: ")
    assert len(lines) == 8
    assert not (tmp_path / "set").exists()


def test_dry_run_fails_on_a_small_disk(prothpc: Prothpc, tmp_path: Path) -> None:
    path = tmp_path / "huge.fasta"
    path.write_bytes(b">a\nMKV\n" * 20_000)
    with path.open("r+b") as file:
        file.truncate(10**13)  # a hole takes no room
    for more in (["--dry-run"], []):
        result = prothpc("preprocess", path, "--output", tmp_path / "set", *more)
        assert result.returncode == 1
        assert f"prothpc: {tmp_path}: the disk is too small: about " in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "set").exists()


def test_few_records_need_few_shards() -> None:
    source = Source(path="a", bytes=572 * 10**9, mtime_ns=0)
    assert default_shards([source], PreprocessOptions()) == 5_959
    assert default_shards([source], PreprocessOptions(limit=1000)) == 8
    assert default_shards([source] * 2, PreprocessOptions(limit=10**6)) == 11
    split = PreprocessOptions(max_length=1000, long="split", overlap=500)
    assert default_shards([source], split) == 11_917
