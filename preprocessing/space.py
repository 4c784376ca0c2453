"""What a job will read and write, estimated from samples of its inputs, and whether it has room."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from preprocessing.columns import parts
from preprocessing.errors import InputError
from preprocessing.fasta import FastaProblem, parse
from preprocessing.options import PreprocessOptions
from preprocessing.sizes import show_size
from preprocessing.sources import UNIT_BYTES, Source, Unit, UnitReader, beginnings
from preprocessing.windows import count_windows

_SAMPLES = 64
"""Places at which the plain files are looked at, spread evenly; and compressed files of which the
beginning is."""

_SAMPLE_BYTES = 128 * 2**10

_SPILL_ROW_BYTES = 32
_SHARD_ROW_BYTES = 24
"""What a row takes besides its id and residues: its key, and where id and residues end."""

_METADATA_BYTES = 26  # of a UniRef header, likewise

_RESIDUES_LEFT = {"none": 1.0, "lz4": 1.0, "zstd": 0.53}
_IDS_LEFT = {"none": 1.0, "lz4": 0.5, "zstd": 0.4}
"""What compression leaves, as measured on UniProt proteins."""

_TOLERANCE = 1.1
"""A disk is refused when a job needs so many times what is free: estimates are not exact."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """About what a job has to do."""

    text_bytes: int
    """FASTA text to be read, decompressed."""
    records: int
    """Records and windows that the length policy leaves."""
    residues: int
    spill_bytes: int
    output_bytes: int


def estimate(sources: Sequence[Source], options: PreprocessOptions) -> Estimate:
    """Estimate from samples of the inputs what a job will read and write.

    Duplicates and exclusions are not known beforehand, so the output may be smaller.
    """
    seen = _Seen()
    for source, text in _samples(sources):
        seen.add(source, text, options)
    text_bytes = sum(
        source.bytes * (1 if source.kind == "plain" else seen.ratio()) for source in sources
    )
    scale = text_bytes / max(seen.text_bytes, 1)
    if options.limit is not None and seen.records:
        scale = min(scale, options.limit * len(sources) / seen.records)
    rows, residues, ids = seen.rows * scale, seen.residues * scale, seen.id_bytes * scale
    if options.keep_metadata:
        ids += rows * _METADATA_BYTES
    left = residues * _RESIDUES_LEFT[options.compression] + ids * _IDS_LEFT[options.compression]
    return Estimate(
        text_bytes=int(seen.text_bytes * scale),
        records=int(rows),
        residues=int(residues),
        spill_bytes=int(residues + ids + rows * _SPILL_ROW_BYTES),
        output_bytes=int(left + rows * _SHARD_ROW_BYTES),
    )


@dataclass(frozen=True, kw_only=True)
class Room:
    """A disk, and what a job will put on it."""

    directory: Path
    needed: int
    free: int


def find_rooms(output: Path, spills: Path, needs: Estimate) -> list[Room]:
    """Return the disks that a job writes to: one, or two if the spills go to another.

    What lies in the directories already, from an earlier attempt, is not needed again.

    Args:
        output: the record set's directory, which need not be there yet.
        spills: the directory that spills are written to, likewise.
        needs: of the whole job.
    """
    on_disk: dict[int, Room] = {}
    for directory, needed in ((output, needs.output_bytes), (spills, needs.spill_bytes)):
        there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        disk = there.stat().st_dev
        present = sum(path.stat().st_size for path in directory.glob("*") if path.is_file())
        before = on_disk[disk].needed if disk in on_disk else 0
        on_disk[disk] = Room(
            directory=on_disk[disk].directory if disk in on_disk else there,
            needed=before + max(0, needed - present),
            free=shutil.disk_usage(there).free,
        )
    return list(on_disk.values())


def check_room(found: Sequence[Room]) -> None:
    """Refuse a job for which a disk is evidently too small.

    Raises:
        InputError: naming the disk.
    """
    for room in found:
        if room.needed > _TOLERANCE * room.free:
            raise InputError(
                f"{room.directory}: the disk is too small: about {show_size(room.needed)} are "
                f"needed and {show_size(room.free)} free: make room, choose another --output, or "
                "put the spills on another disk with --spill"
            )


@dataclass
class _Seen:
    """Sums over the samples."""

    text_bytes: int = 0
    records: int = 0
    rows: int = 0
    residues: int = 0
    id_bytes: int = 0
    _ratios: list[float] = field(default_factory=list)

    def add(self, source: Source, text: np.ndarray, options: PreprocessOptions) -> None:
        try:
            parsed = parse(text, "drop")
        except FastaProblem:
            return  # the job will name its place
        lengths = np.diff(parts(parsed.sequences)[0])[~parsed.invalid].astype(np.int64)
        self.text_bytes += len(text)
        self.records += len(lengths)
        lengths = lengths[lengths >= options.min_length]
        if options.max_length is not None and options.long != "keep":
            long = lengths > options.max_length
            windows = 0
            if options.long == "split":
                counts = count_windows(lengths[long], options.max_length, options.overlap)
                windows = int(counts.sum())
            lengths = np.append(lengths[~long], np.full(windows, options.max_length))
        self.rows += len(lengths)
        self.residues += int(lengths.sum())
        id_bounds = parts(parsed.ids)[0]
        self.id_bytes += int(id_bounds[-1] - id_bounds[0]) * len(lengths) // len(parsed.ids)
        if source.kind != "plain":
            self._ratios.append(len(text) / len(zlib.compress(text.data)))

    def ratio(self) -> float:
        """Text of a compressed file per byte."""
        return sum(self._ratios) / len(self._ratios) if self._ratios else 1.0


def _samples(sources: Sequence[Source]) -> Iterator[tuple[Source, np.ndarray]]:
    """Yield files, and text of whole records from them."""
    plain = [source for source in sources if source.kind == "plain"]
    step = max(1, sum(source.bytes for source in plain) // _SAMPLES)
    skip = 0  # bytes to the next sample
    for source in plain:
        for start in range(skip, source.bytes, step):
            stop = min(start + _SAMPLE_BYTES, source.bytes, start + step)
            yield from _texts(source, Unit(source=0, start=start, stop=stop))
        skip = (skip - source.bytes) % step
    compressed = [source for source in sources if source.kind != "plain"][:_SAMPLES]
    for source, unit in zip(compressed, beginnings(compressed), strict=True):
        for sample in _texts(source, unit):
            yield sample
            break


def _texts(source: Source, unit: Unit) -> Iterator[tuple[Source, np.ndarray]]:
    reader = UnitReader(source, unit, block_bytes=UNIT_BYTES, chunk_bytes=_SAMPLE_BYTES)
    for chunk in reader.chunks():
        yield source, chunk.text
