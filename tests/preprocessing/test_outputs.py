import gzip
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from preprocessing.errors import InputError
from preprocessing.outputs import replaced_files


def write(data: bytes, *paths: Path, overwrite: bool = False) -> None:
    with replaced_files(paths, overwrite=overwrite) as files:
        for path in paths:
            files[path].write(data)


def test_files_appear_together_at_the_end(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    with replaced_files(paths, overwrite=False) as files:
        for path in paths:
            files[path].write(path.name.encode())
        assert not any(path.exists() for path in paths)
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["a", "b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_leaves_what_was_there_and_nothing_else(tmp_path, error):
    def fail() -> None:
        with replaced_files([old, tmp_path / "new.gz"], overwrite=True) as files:
            files[old].write(b"half")
            raise error

    old = tmp_path / "old"
    old.write_text("mine")
    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_text() == "mine"


def test_gzipped_file_is_the_plain_one_without_name_and_time(tmp_path):
    data = b"id\tfamily\n" * 50_000
    write(data, tmp_path / "a.tsv.gz", tmp_path / "b.tsv.gz", tmp_path / "c.tsv")
    packed = (tmp_path / "a.tsv.gz").read_bytes()
    assert packed == (tmp_path / "b.tsv.gz").read_bytes()
    assert packed[3:8] == bytes(5)  # no name, no time
    assert len(packed) < len(data) / 10
    assert gzip.decompress(packed) == (tmp_path / "c.tsv").read_bytes() == data


def test_existing_files_are_kept_unless_told_otherwise(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_text("mine")
    with pytest.raises(InputError, match=r"old exists: .* --overwrite"):
        write(b"other", new, old)
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_text() == "mine"
    write(b"other", new, old, overwrite=True)
    assert old.read_text() == new.read_text() == "other"


def test_path_that_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(InputError, match="not a regular file"):
            write(b"", path, overwrite=True)


def test_two_paths_to_one_file_are_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for other in (tmp_path / "." / "a", tmp_path / "x" / ".." / "a", tmp_path / "link"):
        with pytest.raises(InputError, match="two outputs"):
            write(b"", tmp_path / "a", other)


def test_place_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path / "absent" / "a", "No such file"),
        (tmp_path / "file" / "a", "Not a directory"),
        (tmp_path / ("a" * 300), "File name too long"),
    ):
        with pytest.raises(InputError, match=rf"cannot write {path}: {reason}"):
            write(b"", tmp_path / "first", path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["big", "big.gz"])
def test_full_disk_is_said_and_leaves_nothing(tmp_path, name):
    code = (
        "import os, sys; from pathlib import Path; "
        "from preprocessing.outputs import replaced_files\n"
        "big, small = Path(sys.argv[1]), Path(sys.argv[1]).parent / 'small'\n"
        "with replaced_files([big, small], overwrite=False) as files:\n"
        "    files[small].write(b'small')\n"
        "    for _ in range(10): files[big].write(os.urandom(50_000))"
    )
    limit = 100_000
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / name)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    last_line = done.stderr.strip().splitlines()[-1]
    assert f"InputError: cannot write {tmp_path / name}: File too large" in last_line
    assert "Exception ignored" not in done.stderr
    assert not list(tmp_path.iterdir())
