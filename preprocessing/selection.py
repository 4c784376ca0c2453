"""What becomes of the records of a chunk: length policy, exclusion, hold-out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from preprocessing.clusters import Clusters
from preprocessing.columns import key_column, parts, take, to_binary
from preprocessing.exclusions import Exclusions
from preprocessing.fasta import Parsed
from preprocessing.keys import Placement, hash_residues
from preprocessing.marks import EXCLUDED, IN_HOLDOUT, mark_residues
from preprocessing.options import PreprocessOptions
from preprocessing.windows import cut_windows


class Rows(NamedTuple):
    """N records, or marks for their equals, that go on to the reduce phase."""

    keys: np.ndarray
    """uint8 [N, 16]."""
    ids: pa.Array
    """binary [N]."""
    sequences: pa.Array
    """binary [N]."""
    metadata: pa.Array | None
    """binary [N], see `uniref_headers`; None if it is not wanted."""
    shards: np.ndarray
    """int64 [N], where each belongs."""

    def columns(self) -> list[pa.Array]:
        """Return the columns of a run."""
        columns = [key_column(self.keys), self.ids, self.sequences]
        return columns if self.metadata is None else [*columns, self.metadata]


class _Fate(NamedTuple):
    """What is decided of N records."""

    excluded: np.ndarray  # bool [N]
    held_out: np.ndarray  # bool [N]
    marked: np.ndarray  # bool [N], excluded ones whose equals the exclusion files may not name


class Selection:
    """Decides over the records of an input."""

    def __init__(
        self,
        options: PreprocessOptions,
        placement: Placement,
        exclusions: Exclusions | None,
        clusters: Clusters | None,
    ) -> None:
        self._options = options
        self._placement = placement
        self._exclusions = exclusions
        self._clusters = clusters

    def select(self, parsed: Parsed, counts: Counter[str]) -> Iterator[Rows]:
        """Count a chunk's records and yield what is left of them."""
        whole, long = self._by_length(parsed, counts)
        keys = hash_residues(*parts(whole.sequences))
        fate = self._decide(keys, whole.ids, counts)
        yield from self._rows(keys, whole.ids, whole.sequences, whole.metadata, fate, counts)
        if len(long.ids):
            yield from self._windows(long, counts)

    def _by_length(self, parsed: Parsed, counts: Counter[str]) -> tuple[Parsed, Parsed]:
        """Return the records to be kept whole, and those to be split."""
        options = self._options
        lengths = np.diff(parts(parsed.sequences)[0])
        too_short = ~parsed.invalid & (lengths < options.min_length)
        longer = np.zeros(len(lengths), bool)
        if options.max_length is not None:
            longer = ~parsed.invalid & (lengths > options.max_length)
        split = longer & (options.long == "split")
        reasons = {
            "invalid": parsed.invalid,
            "too_short": too_short,
            "too_long": longer & (options.long == "drop"),
            "split": split,
        }
        everything = np.ones(len(lengths), bool)
        for name, rows in {"read": everything, "longer": longer, **reasons}.items():
            counts[f"{name}.records"] += int(np.count_nonzero(rows))
            counts[f"{name}.residues"] += int(lengths[rows].sum())
        counts.update(parsed.changed)
        whole = ~np.logical_or.reduce(list(reasons.values()))
        if whole.all():
            return parsed, parsed.take(np.empty(0, np.int64))
        return parsed.take(np.flatnonzero(whole)), parsed.take(np.flatnonzero(split))

    def _windows(self, long: Parsed, counts: Counter[str]) -> Iterator[Rows]:
        """Cut long records into windows, which share their fate."""
        assert self._options.max_length is not None
        of_parents = self._decide(hash_residues(*parts(long.sequences)), long.ids, counts)
        for ids, sequences, parents in cut_windows(
            long.ids, long.sequences, self._options.max_length, self._options.overlap
        ):
            counts["windows.records"] += len(ids)
            counts["windows.residues"] += len(ids) * self._options.max_length
            keys = hash_residues(*parts(sequences))
            excluded = of_parents.excluded[parents]
            if self._exclusions is not None:
                excluded |= self._exclusions.by_key(keys)
            fate = _Fate(excluded, of_parents.held_out[parents], excluded)
            metadata = None if long.metadata is None else take(long.metadata, parents)
            yield from self._rows(keys, ids, sequences, metadata, fate, counts)

    def _decide(self, keys: np.ndarray, ids: pa.Array, counts: Counter[str]) -> _Fate:
        nothing = np.zeros(len(keys), bool)
        if self._clusters is None:
            held_out = self._placement.held_out(keys)
        else:
            held_out, listed = self._clusters.look_up(ids)
            counts["listed.records"] += int(np.count_nonzero(listed))
            counts["unlisted.records"] += int(np.count_nonzero(~listed))
        if self._exclusions is None:
            return _Fate(nothing, held_out, nothing)
        by_id = self._exclusions.by_id(ids)
        return _Fate(self._exclusions.by_key(keys) | by_id, held_out, by_id)

    def _rows(
        self,
        keys: np.ndarray,
        ids: pa.Array,
        sequences: pa.Array,
        metadata: pa.Array | None,
        fate: _Fate,
        counts: Counter[str],
    ) -> Iterator[Rows]:
        """Yield those that are not excluded, and marks where the fate of equals may differ."""
        excluded, held_out = fate.excluded, fate.held_out
        lengths = np.diff(parts(sequences)[0])
        counts["excluded.records"] += int(np.count_nonzero(excluded))
        counts["excluded.residues"] += int(lengths[excluded].sum())
        if fate.marked.any():
            for split in self._placement.splits:
                yield self._marks(keys[fate.marked], EXCLUDED, split)
        if self._options.equals_may_differ and held_out.any():
            yield self._marks(keys[held_out & ~excluded], IN_HOLDOUT, "train")
        if excluded.any():
            rows = np.flatnonzero(~excluded)
            keys, held_out = keys[rows], held_out[rows]
            ids, sequences = take(ids, rows), take(sequences, rows)
            metadata = None if metadata is None else take(metadata, rows)
        yield Rows(keys, ids, sequences, metadata, self._placement.shard_of(keys, held_out))

    def _marks(self, keys: np.ndarray, mark: int, split: str) -> Rows:
        """Return a mark for each key, where records of the split with this key would be."""
        in_split = np.full(len(keys), split == "holdout")
        shards = self._placement.shard_of(keys, in_split)
        empty = to_binary(np.zeros(len(keys) + 1, np.int32), np.empty(0, np.uint8))
        metadata = empty if self._options.keep_metadata else None
        return Rows(
            np.ascontiguousarray(keys), empty, mark_residues(len(keys), mark), metadata, shards
        )
