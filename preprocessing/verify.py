"""`prothpc verify`: is a record set what its manifest says, and is the manifest sound?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from preprocessing.columns import open_arrow
from preprocessing.errors import InputError
from preprocessing.files import hash_file
from preprocessing.keys import KEY_BYTES, Placement, halves, hash_residues
from preprocessing.keysets import KeySet
from preprocessing.manifest import CHANGES, REASONS
from preprocessing.parallel import Ranks, Serial, on_first_rank, share_out
from preprocessing.records import (
    MANIFEST,
    RUN,
    SPLITS,
    Records,
    as_records,
    canonical_json,
    read_manifest,
    seal,
    shard_schema,
)

_NOT_SEALED = "its content does not have the checksum that was written with it"
_FIRST_LETTER, _LAST_LETTER = ord("A"), 25  # Z is the 25th after A


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was found to be in order."""

    shards: int
    records: int
    residues: int
    bytes: int


def verify(directory: Path, ranks: Ranks | None = None) -> VerifyReport:
    """Check everything that can be known about a record set.

    Every file is hashed, so that a changed byte anywhere is found; every shard is recounted; keys
    must be those of the residues, in order, and lie in the shard's range and split; letters must
    be legal; with de-duplication no two records may have equal residues; the manifest's totals
    must add up, and its files be all there are.

    Args:
        directory: the record set.
        ranks: the job, from `parallel.connect`; all its ranks must call this. None: this process.

    Raises:
        InputError: on every rank, listing all that is wrong.
    """
    ranks = ranks or Serial()
    directory = Path(directory)
    outline = on_first_rank(ranks, lambda: _read_outline(directory))

    def work(tasks: Iterator[int]) -> dict[int, list[str]]:
        return {task: _check_shard(outline, task) for task in tasks}

    problems = list(outline.problems)
    found: dict[int, list[str]] = {}
    for part in share_out(ranks, len(outline.shards), work):
        found |= part
    for number in sorted(found):
        problems += [f"{outline.shards[number]['name']}: {what}" for what in found[number]]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems):,} problems"
        raise InputError(
            f"{directory}: {count}; make the record set again, or copy it again from where it is "
            "whole\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    return VerifyReport(
        shards=len(outline.shards),
        records=sum(shard["records"] for shard in outline.shards),
        residues=sum(shard["residues"] for shard in outline.shards),
        bytes=sum(shard["bytes"] for shard in outline.shards),
    )


class _Outline(NamedTuple):
    directory: Path
    placement: Placement
    dedup: bool
    by_cluster: bool
    """Whether clusters were held out."""
    split_length: int | None
    """Length of the windows that long records were split into, if they were."""
    schema: pa.Schema
    rows_per_batch: int
    shards: list[dict[str, Any]]
    """The manifest's shards, numbered as `Placement` does."""
    problems: list[str]
    """What is wrong with the manifest itself."""


def _read_outline(directory: Path) -> _Outline:
    manifest, content = read_manifest(directory)
    if seal(manifest) != manifest:
        raise InputError(
            f"{directory / MANIFEST}: damaged: {_NOT_SEALED}: copy it again from where it is "
            "whole, or make the record set again"
        )
    try:
        options = manifest["options"]
        placement = Placement(options["shards"], options["holdout"])
        shards = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
        problems = [f"{MANIFEST}: {what}" for what in _check_manifest(manifest, content, shards)]
        names = [shard["name"] for shard in shards]
        expected = [placement.file_name(number) for number in range(len(placement))]
        if names != expected:
            raise ValueError(f"shards are not named {expected[0]} to {expected[-1]}")
        outline = _Outline(
            directory=directory,
            placement=placement,
            dedup=options["dedup"],
            by_cluster=options["holdout_by"] is not None,
            split_length=options["max_length"] if options["long"] == "split" else None,
            schema=shard_schema(metadata=options["keep_metadata"]),
            rows_per_batch=manifest["rows_per_batch"],
            shards=shards,
            problems=problems,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{directory / MANIFEST}: damaged ({error!r}): make the record set again"
        ) from error
    outline.problems.extend(f"{RUN}: {what}" for what in _check_run(directory / RUN))
    present = {path.name for path in directory.glob("*.arrow")}
    outline.problems.extend(
        f"{name}: the file is not in {MANIFEST}" for name in sorted(present - set(names))
    )
    return outline


def _check_manifest(
    manifest: dict[str, Any], content: bytes, shards: list[dict[str, Any]]
) -> Iterator[str]:
    """Yield what does not add up in a manifest."""
    if canonical_json(manifest) != content:
        yield "not written by prothpc (its JSON is not in canonical form)"
    totals = manifest["totals"]
    if sorted(totals["not_kept"]) != sorted(REASONS) or sorted(totals["changed"]) != sorted(
        CHANGES
    ):
        yield "the totals have unknown or missing entries"
    splits = {split: manifest["splits"][split]["shards"] for split in SPLITS}
    for what in ("records", "residues"):
        sums = {
            "the inputs": (totals["read"][what], sum(e[what] for e in manifest["inputs"])),
            "kept and not kept": (
                totals["read"][what] + totals["windows"][what],
                totals["kept"][what] + sum(part[what] for part in totals["not_kept"].values()),
            ),
            "dropped and split": (
                totals["longer_than_max_length"][what],
                sum(totals["not_kept"][reason][what] for reason in ("too_long", "split"))
                if manifest["options"]["long"] != "keep"
                else totals["longer_than_max_length"][what],
            ),
            "the shards": (totals["kept"][what], sum(shard[what] for shard in shards)),
        } | {
            f"the {split} shards": (
                totals["splits"][split][what],
                sum(shard[what] for shard in splits[split]),
            )
            for split in SPLITS
        }
        for name, (total, parts) in sums.items():
            if total != parts:
                yield f"{what} do not add up: {total:,} in the totals, {parts:,} in {name}"


def _check_run(path: Path) -> Iterator[str]:
    """Yield what is wrong with the account of the run."""
    try:
        content = path.read_bytes()
        run = json.loads(content)
        if canonical_json(seal(run)) != content:
            yield _NOT_SEALED
    except OSError as error:
        yield f"cannot be read: {error.strerror}"
    except (ValueError, AttributeError):
        yield "is not JSON any more"


def _check_shard(outline: _Outline, number: int) -> list[str]:
    """Return what is wrong with a shard."""
    about = outline.shards[number]
    path = outline.directory / about["name"]
    try:
        size, digest = hash_file(path)
    except OSError as error:
        return [f"cannot be read: {error.strerror}"]
    problems = []
    if size != about["bytes"]:
        problems.append(f"has {size:,} bytes instead of {about['bytes']:,}")
    if digest != about["xxh3_128"]:
        problems.append(f"its bytes have the hash {digest} instead of {about['xxh3_128']}")
    try:
        reader = open_arrow(path)
        if not reader.schema.equals(outline.schema, check_metadata=True):
            return [*problems, "has other columns than a record set has"]
        check = _ShardCheck(outline, number)
        for batch in range(reader.num_record_batches):
            content = reader.get_batch(batch)
            content.validate(full=True)
            check.add(as_records(content), last=batch == reader.num_record_batches - 1)
    except (OSError, pa.ArrowException, ValueError, IndexError) as error:
        return [*problems, f"is no readable Arrow file: {error}"]
    problems += check.problems
    for what, counted in (("records", check.records), ("residues", check.residues)):
        if counted != about[what]:
            problems.append(f"has {counted:,} {what}, {about[what]:,} in {MANIFEST}")
    if check.first_key != about["first_key"]:
        problems.append(f"begins with key {check.first_key}, {about['first_key']} in {MANIFEST}")
    return problems


class _ShardCheck:
    """Checks the records of one shard, batch after batch; names the first of each kind of fault."""

    def __init__(self, outline: _Outline, number: int) -> None:
        self._outline = outline
        self._number = number
        self._held_out = number >= outline.placement.shards
        self._twins = self._held_out_twins()
        self._previous: Records | None = None
        self.problems: list[str] = []
        self.records = 0
        self.residues = 0
        self.first_key: str | None = None

    def add(self, batch: Records, *, last: bool) -> None:
        full = self._outline.rows_per_batch
        if len(batch) > full or (len(batch) < full and not last) or len(batch) == 0:
            self.problems.append(f"a batch has {len(batch):,} rows instead of {full:,}")
        if len(batch) == 0:
            return
        if self.first_key is None:
            self.first_key = batch.keys[0].tobytes().hex()
        residues = batch.residues[batch.offsets[0] : batch.offsets[-1]]
        no_letter = np.flatnonzero(residues - np.uint8(_FIRST_LETTER) > _LAST_LETTER)
        record_of = np.searchsorted(batch.offsets - batch.offsets[0], no_letter, side="right") - 1
        self._note(batch, record_of, "holds a byte that is no residue")
        self._note(batch, np.flatnonzero(np.diff(batch.offsets) == 0), "has no residues")
        right = hash_residues(batch.offsets, batch.residues)
        self._note(batch, np.flatnonzero((right != batch.keys).any(axis=1)), "has a wrong key")
        self._check_place(batch)
        self._check_order(batch)
        self.records += len(batch)
        self.residues += len(residues)
        self._previous = batch

    def _check_place(self, batch: Records) -> None:
        """See that the rows are in the right split, and there in the right shard."""
        placement, held_out = self._outline.placement, np.full(len(batch), self._held_out)
        place = placement.shard_of(batch.keys, held_out)
        self._note(batch, np.flatnonzero(place != self._number), "belongs into another shard")
        if not self._outline.by_cluster:  # whose table is not at hand
            wrong = placement.held_out(batch.keys) != held_out
            if self._outline.split_length is not None:  # windows follow what they were cut from
                wrong &= np.diff(batch.offsets) != self._outline.split_length
            self._note(batch, np.flatnonzero(wrong), "belongs into the other split")
        if self._twins is not None:
            twins = np.flatnonzero(self._twins.contains(batch.keys))
            self._note(batch, twins, "is in the held-out split, too")

    def _held_out_twins(self) -> KeySet | None:
        """Return the held-out keys in a train shard's range, where they do not follow from keys."""
        outline, count = self._outline, self._outline.placement.holdout_shards
        keys_decide = outline.split_length is None and not outline.by_cluster
        if self._held_out or count == 0 or keys_decide:
            return None
        train = outline.placement.shards
        first = self._number * count // train
        last = ((self._number + 1) * count - 1) // train
        keys = [np.empty((0, KEY_BYTES), np.uint8)]
        for about in outline.shards[train + first : train + last + 1]:
            keys += _keys_of(outline.directory / about["name"])
        return KeySet.of(np.concatenate(keys))

    def _check_order(self, batch: Records) -> None:
        keys = batch.keys
        if self._previous is not None:
            keys = np.concatenate([self._previous.keys[-1:], keys])
        first = len(batch) - len(keys)  # -1 if row 0 is compared with the batch before
        high, low = halves(keys)
        same_high = high[1:] == high[:-1]
        falls = (high[1:] < high[:-1]) | (same_high & (low[1:] < low[:-1]))
        self._note(batch, np.flatnonzero(falls) + 1 + first, "is out of order")
        for row in (np.flatnonzero(same_high & (low[1:] == low[:-1])) + 1 + first).tolist():
            before = self._previous if row == 0 and self._previous is not None else batch
            text_before, id_before = _content(before, row - 1)
            text, name = _content(batch, row)
            if (text, name) < (text_before, id_before):
                self._note(batch, np.array([row]), "is out of order")
            if self._outline.dedup and text == text_before:
                self._note(batch, np.array([row]), "has the same residues as the one before")

    def _note(self, batch: Records, rows: np.ndarray, what: str) -> None:
        if len(rows):
            row = int(rows[0])
            more = len(np.unique(rows)) - 1
            others = f" (and {more:,} more in the same batch)" if more else ""
            name = batch.id_column[row].as_py()
            self.problems.append(f"record {self.records + row:,} ({name}) {what}{others}")


def _keys_of(path: Path) -> list[np.ndarray]:
    """Return the keys of a shard, or none if it is damaged, which its own check tells."""
    try:
        reader = open_arrow(path)
        batches = map(reader.get_batch, range(reader.num_record_batches))
        return [as_records(batch).keys for batch in batches]
    except (OSError, pa.ArrowException, ValueError, IndexError):
        return []


def _content(records: Records, row: int) -> tuple[bytes, str]:
    """Return a row's residues and id; row -1 is the last."""
    row %= len(records)
    start, stop = records.offsets[row : row + 2]
    return records.residues[start:stop].tobytes(), records.id_column[row].as_py()
