"""What a user may ask of record generation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from preprocessing.errors import InputError
from preprocessing.fasta import OnInvalid
from preprocessing.files import hash_file
from preprocessing.keys import Placement
from preprocessing.shards import Compression

MAX_SHARDS = 65_536
_MIN_MEMORY = 2**20

OnLong = Literal["keep", "drop", "split"]


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """What is done with the records; all but `memory` and `spill` are part of what the set is.

    Raises:
        InputError: if a value is out of range, or two contradict each other.
    """

    shards: int | None = None
    """Shards of the train split, 1 to 65,536; None: one per 96 MB of FASTA text, at least 8, with
    a gzip file counted as twice its size."""
    holdout: float = 0.0
    """Fraction of the records that goes to the held-out split, 0 to below 1."""
    holdout_by: Path | None = None
    """Table of clusters: whole clusters are held out, see `clusters`; None: single sequences."""
    min_length: int = 1
    """Shorter records (residues) are not kept."""
    max_length: int | None = None
    """Longer records (residues) are treated as `long` says; None: no limit."""
    long: OnLong = "drop"
    """A record longer than `max_length`: "drop" leaves it out, "split" cuts it into windows of
    `max_length` residues, "keep" keeps and counts it."""
    overlap: int = 0
    """Residues that a window shares with the next, at least; 0 to half of `max_length`."""
    exclude: tuple[Path, ...] = ()
    """Files that name what is left out: see `exclusions`."""
    on_invalid: OnInvalid = "error"
    """A record with something other than residues in it: "error" refuses the input, "mask" writes
    X for it, "drop" leaves the record out (and records without residues)."""
    dedup: bool = True
    """Keep one of several records with equal residues: the one with the smallest id."""
    keep_metadata: bool = False
    """Keep cluster size, taxon and representative of UniRef headers, see `uniref_headers`."""
    limit: int | None = None
    """Read only the first records of each input, this many; None: all."""
    compression: Compression = "none"
    """Of the shards: "none" can be read in place, "lz4" and "zstd" are decompressed by batches."""
    memory: int = 2**30
    """Bytes of records that a rank holds at a time."""

    spill: Path | None = None
    """Directory for what is collected until all input is read, on a disk of the only node; None:
    in the output directory."""

    def __post_init__(self) -> None:
        if self.shards is not None and not 1 <= self.shards <= MAX_SHARDS:
            raise InputError(f"--shards {self.shards}: choose 1 to {MAX_SHARDS:,}")
        if not 0 <= self.holdout < 1:
            raise InputError(f"--holdout {self.holdout}: choose a fraction from 0 to below 1")
        if self.holdout_by is not None and self.holdout == 0:
            raise InputError(
                f"--holdout-by {self.holdout_by} needs --holdout: say what share to hold out"
            )
        if self.min_length < 1:
            raise InputError(f"--min-length {self.min_length}: choose 1 or more")
        if self.max_length is not None and self.max_length < self.min_length:
            raise InputError(
                f"--max-length {self.max_length} is below --min-length {self.min_length}: "
                "no record would be kept"
            )
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit {self.limit}: choose 1 or more")
        self._check_windows()
        if self.on_invalid not in get_args(OnInvalid):
            raise InputError(
                f"--on-invalid {self.on_invalid}: choose one of {', '.join(get_args(OnInvalid))}"
            )
        if self.compression not in get_args(Compression):
            raise InputError(
                f"--compression {self.compression}: choose one of "
                f"{', '.join(get_args(Compression))}"
            )
        if self.memory < _MIN_MEMORY:
            raise InputError(f"--memory {self.memory}: choose {_MIN_MEMORY:,} bytes or more")

    @property
    def equals_may_differ(self) -> bool:
        """Whether of equal sequences one may be held out and another not."""
        return self.long == "split" or self.holdout_by is not None

    @property
    def leaves_marks(self) -> bool:
        """Whether the map phase leaves marks, see `marks`."""
        return self.equals_may_differ or bool(self.exclude)

    def _check_windows(self) -> None:
        if self.long not in get_args(OnLong):
            raise InputError(f"--long {self.long}: choose one of {', '.join(get_args(OnLong))}")
        if self.long != "drop" and self.max_length is None:
            raise InputError(
                f"--long {self.long} needs --max-length: say from which length on a record is long"
            )
        if self.overlap and self.long != "split":
            raise InputError(f"--overlap {self.overlap} needs --long split: add it")
        if self.max_length is not None and not 0 <= self.overlap <= self.max_length // 2:
            raise InputError(
                f"--overlap {self.overlap}: choose 0 to {self.max_length // 2}, "
                f"half of --max-length {self.max_length}"
            )


def record_options(options: PreprocessOptions, placement: Placement) -> dict[str, Any]:
    """Return what changes the records: options, with the number of shards and files filled in.

    Raises:
        InputError: if a file that an option names cannot be read.
    """
    changing = asdict(options)
    for name in ("memory", "spill"):
        del changing[name]
    return changing | {
        "shards": placement.shards,
        "holdout_by": None if options.holdout_by is None else describe_file(options.holdout_by),
        "exclude": sorted(map(describe_file, options.exclude), key=lambda file: file["hash"]),
    }


def describe_file(path: Path) -> dict[str, Any]:
    """Return a file's size and hash, by which the manifest knows it.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        size, digest = hash_file(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    return {"bytes": size, "hash": digest}
