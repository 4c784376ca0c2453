"""What a user may ask of record generation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, get_args

from preprocessing.errors import InputError
from preprocessing.fasta import OnInvalid
from preprocessing.keys import Placement

MAX_SHARDS = 65_536
_MIN_MEMORY = 2**20


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """What is done with the records. All but `memory` are part of what the record set is.

    Raises:
        InputError: if a value is out of range, or two contradict each other.
    """

    shards: int | None = None
    """Shards of the train split, 1 to 65,536; None: one per 96 MB of FASTA text, at least 8, with
    a gzip file counted as twice its size."""
    holdout: float = 0.0
    """Fraction of the records that goes to the held-out split, 0 to below 1."""
    min_length: int = 1
    """Shorter records (residues) are not kept."""
    max_length: int | None = None
    """Longer records (residues) are not kept; None: no limit."""
    on_invalid: OnInvalid = "error"
    """A record with something other than residues in it: "error" refuses the input, "mask" writes
    X for it, "drop" leaves the record out (and records without residues)."""
    dedup: bool = True
    """Keep one of several records with equal residues: the one with the smallest id."""
    memory: int = 2**30
    """Bytes of records that a rank holds at a time."""

    def __post_init__(self) -> None:
        if self.shards is not None and not 1 <= self.shards <= MAX_SHARDS:
            raise InputError(f"--shards {self.shards}: choose 1 to {MAX_SHARDS:,}")
        if not 0 <= self.holdout < 1:
            raise InputError(f"--holdout {self.holdout}: choose a fraction from 0 to below 1")
        if self.min_length < 1:
            raise InputError(f"--min-length {self.min_length}: choose 1 or more")
        if self.max_length is not None and self.max_length < self.min_length:
            raise InputError(
                f"--max-length {self.max_length} is below --min-length {self.min_length}: "
                "no record would be kept"
            )
        if self.on_invalid not in get_args(OnInvalid):
            raise InputError(
                f"--on-invalid {self.on_invalid}: choose one of {', '.join(get_args(OnInvalid))}"
            )
        if self.memory < _MIN_MEMORY:
            raise InputError(f"--memory {self.memory}: choose {_MIN_MEMORY:,} bytes or more")


def record_options(options: PreprocessOptions, placement: Placement) -> dict[str, Any]:
    """Return the options that change the records, with the number of shards filled in."""
    return {name: value for name, value in asdict(options).items() if name != "memory"} | {
        "shards": placement.shards
    }
