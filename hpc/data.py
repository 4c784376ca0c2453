"""Micro-batches from records: a rank's streams, read ahead by one thread.

Tensors carry shape suffixes: B sequences, L tokens.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from hpc.config import DataConfig, TrainConfig
from hpc.streams import StreamOrder, mix, permutation, streams_of_rank
from preprocessing.errors import InputError
from preprocessing.records import RecordSet
from preprocessing.vocabulary import Vocabulary

PAD_MULTIPLE = 8
"""Batches are padded to a multiple of this, the tile of half-precision matrix units."""

STEPS_AHEAD = 2
"""Global steps that the reading thread may be ahead of the training."""

_CROP_DRAW = 1  # tells the draw of a window from the seed that the objective gets


@dataclass(frozen=True)
class MicroBatch:
    """Padded token ids of some sequences."""

    stream: int
    """Stream that it comes from; -1 for evaluation."""
    numbers: np.ndarray
    """int64 [B]: record numbers."""
    tokens: torch.Tensor
    """uint8 [B, L]: [CLS], residues, [SEP], then [PAD]."""
    lengths: torch.Tensor
    """int64 [B]: tokens of each sequence, special ones included."""
    seeds: torch.Tensor
    """int64 [B]: hash of (run, record, epoch), for whatever an objective draws."""


@dataclass(frozen=True)
class Samples:
    """Token ids of N samples, packed: the residues of one follow those of the one before."""

    numbers: np.ndarray
    """int64 [N]: record numbers."""
    tokens: np.ndarray
    """uint8: ids of residues; special ones come when a batch is made."""
    offsets: np.ndarray
    """int64 [N + 1]: sample i is `tokens[offsets[i]:offsets[i + 1]]`."""
    seeds: np.ndarray
    """int64 [N]: hash of (run, record, epoch)."""


class Batcher:
    """Reads records and makes them token ids, the same whoever asks.

    Args:
        records: training or held-out records.
        vocabulary: of the model.
        config: length and what becomes of longer proteins.
        seed: of the run.
    """

    def __init__(
        self, records: RecordSet, vocabulary: Vocabulary, config: DataConfig, seed: int
    ) -> None:
        self._records = records
        self._table = vocabulary.lookup_table().tobytes()
        self._pad = vocabulary.id_of(vocabulary.pad)
        self._cls = vocabulary.id_of(vocabulary.cls)
        self._sep = vocabulary.id_of(vocabulary.sep)
        self._residues = config.length - 2
        self._random_crop = config.long == "crop-random"
        self._seed = seed

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Return int64 [N]: tokens that each record will have, special ones included."""
        return np.minimum(self._records.pick(numbers).lengths, self._residues) + 2

    def read(self, numbers: np.ndarray, epochs: np.ndarray) -> Samples:
        """Return samples of these records; many at once are read faster.

        Args:
            numbers: int64 [N] record numbers.
            epochs: int64 [N], which shift random windows and the objective's draws.
        """
        picked = self._records.pick(numbers)
        seeds = mix(self._seed, picked.keys[:, :8].copy().view(">u8")[:, 0], epochs)
        lengths = np.minimum(picked.lengths, self._residues)
        starts = np.zeros(len(numbers), np.int64)
        if self._random_crop:
            places = (picked.lengths - lengths + 1).astype(np.uint64)
            starts = (mix(seeds, _CROP_DRAW) % places).astype(np.int64)
        # Five times as fast as indexing the table with the residues.
        tokens = picked.residues(starts, lengths).tobytes().translate(self._table)
        return Samples(
            numbers=numbers,
            tokens=np.frombuffer(tokens, np.uint8),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            seeds=seeds.view(np.int64),
        )

    def pad(self, stream: int, samples: Samples, start: int = 0, count: int = 0) -> MicroBatch:
        """Return a micro-batch of neighbouring samples.

        Args:
            stream: recorded in the batch.
            samples: of `read`.
            start: first of them.
            count: sequences in the batch; 0: all from `start`.
        """
        chosen = slice(start, start + count if count else len(samples.numbers))
        offsets = samples.offsets[chosen.start : chosen.stop + 1]
        lengths = offsets[1:] - offsets[:-1] + 2
        width = -(-int(lengths.max()) // PAD_MULTIPLE) * PAD_MULTIPLE
        tokens = np.full((len(lengths), width), self._pad, np.uint8)
        tokens[:, 0] = self._cls
        bounds = offsets.tolist()
        for row, first, end in zip(tokens, bounds, bounds[1:], strict=False):
            row[1 : end - first + 1] = samples.tokens[first:end]
            row[end - first + 1] = self._sep
        return MicroBatch(
            stream=stream,
            numbers=samples.numbers[chosen],
            tokens=torch.from_numpy(tokens),
            lengths=torch.from_numpy(lengths),
            seeds=torch.from_numpy(samples.seeds[chosen]),
        )


class Stream:
    """One stream's micro-batches, with a cursor.

    Args:
        order: the stream's sample sequence.
        batcher: makes token ids.
        micro_batch: sequences in a micro-batch.
        bucket_batches: micro-batches that are cut together from samples sorted by length.
    """

    def __init__(
        self, order: StreamOrder, batcher: Batcher, micro_batch: int, bucket_batches: int
    ) -> None:
        self._order = order
        self._batcher = batcher
        self._micro_batch = micro_batch
        self._bucket_batches = bucket_batches
        self._loaded_window = -1
        self.cursor: tuple[int, ...] = (0, 0)
        """Window, and micro-batch in that window, that come next."""

    def next(self) -> MicroBatch:
        """Return the next micro-batch and move the cursor past it."""
        window, index = self.cursor
        if window != self._loaded_window:
            self._samples = self._read(window)
            self._loaded_window = window
        self.cursor = (window, index + 1) if index + 1 < self._bucket_batches else (window + 1, 0)
        start = index * self._micro_batch
        return self._batcher.pad(self._order.stream, self._samples, start, self._micro_batch)

    def _read(self, window: int) -> Samples:
        """Read a window's samples, in the order in which micro-batches take them."""
        size = self._micro_batch * self._bucket_batches
        numbers, epochs = self._order.samples(window * size, size)
        rows = np.arange(size)
        if self._bucket_batches > 1:
            rows = np.argsort(self._batcher.lengths(numbers), kind="stable")
        batches = rows.reshape(self._bucket_batches, self._micro_batch)
        words = (self._order.seed, self._order.stream, window)
        rows = batches[permutation(len(batches), *words)].ravel()
        return self._batcher.read(numbers[rows], epochs[rows])


class Readable(Protocol):
    """A stream, of padded sequences or of lanes."""

    cursor: tuple[int, ...]
    """Where it is; as many numbers in every stream of a run."""

    def next(self) -> Any:
        """Return the next micro-batch and move the cursor past it."""
        ...


class StreamLoader:
    """The micro-batches of one rank, step by step, made ahead by a thread.

    Args:
        streams: the streams that this rank owns.
        prepare: turns a micro-batch into what the training step takes; runs in the thread.

    The state counts what `next_step` has handed out, not what the thread has read ahead.
    """

    def __init__(self, streams: Sequence[Readable], prepare: Callable[[Any], Any]) -> None:
        self._streams = streams
        self._prepare = prepare
        self._cursors = [stream.cursor for stream in streams]
        self._queue: queue.Queue[tuple[list[Any], list[tuple[int, ...]]] | BaseException] | None
        self._queue = None
        self._stop = threading.Event()

    def next_step(self) -> list[Any]:
        """Return one prepared micro-batch of every stream of this rank.

        Raises:
            InputError: if a shard cannot be read.
        """
        if self._queue is None:
            self._queue = queue.Queue(maxsize=STEPS_AHEAD)
            self._thread = threading.Thread(target=self._read_ahead, daemon=True, name="loader")
            self._thread.start()
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        batches, self._cursors = item
        return batches

    def state_dict(self) -> dict[str, list[list[int]]]:
        """Return the cursors of this rank's streams, in order of streams."""
        return {"cursors": [list(cursor) for cursor in self._cursors]}

    def load_state_dict(self, state: dict[str, list[list[int]]]) -> None:
        """Continue from these cursors; only before the first step."""
        for stream, cursor in zip(self._streams, state["cursors"], strict=True):
            stream.cursor = tuple(cursor)
        self._cursors = [stream.cursor for stream in self._streams]

    def close(self) -> None:
        """End the reading thread."""
        self._stop.set()
        if self._queue is not None:
            while self._thread.is_alive():
                try:
                    self._queue.get(timeout=0.05)
                except queue.Empty:
                    continue

    def _read_ahead(self) -> None:
        assert self._queue is not None
        try:
            while not self._stop.is_set():
                batches = [self._prepare(stream.next()) for stream in self._streams]
                self._queue.put((batches, [stream.cursor for stream in self._streams]))
        except BaseException as error:  # handed to the training thread, which raises it
            self._queue.put(error)


def open_streams(
    batcher: Batcher, data: DataConfig, train: TrainConfig, records: int, rank: int, size: int
) -> list[Stream]:
    """Return the streams of one rank.

    Args:
        batcher: reads the training records.
        data: block, pool and bucket sizes.
        train: seed, global batch and micro-batch.
        records: how many training records there are.
        rank: of this process.
        size: ranks in all.

    Raises:
        InputError: if the ranks cannot share the streams evenly, or records are too few.
    """
    orders = [
        StreamOrder(
            seed=train.seed,
            stream=stream,
            streams=train.streams,
            records=records,
            block_records=data.block_records,
            pool_blocks=data.pool_blocks,
        )
        for stream in streams_of_rank(train.streams, rank, size)
    ]
    return [Stream(order, batcher, train.micro_batch, data.bucket_batches) for order in orders]


def check_vocabulary(records: RecordSet, vocabulary: Vocabulary, model_size: int) -> None:
    """Refuse a model whose token ids this record set or vocabulary cannot give.

    Raises:
        InputError: if the records hold no residues, or the model has another number of tokens.
    """
    stored = records.manifest["vocabulary"]["name"]
    if stored != "residues":
        raise InputError(
            f"{records.directory} holds records of vocabulary {stored!r}, not residues, so "
            f"data.vocabulary = {vocabulary.name!r} cannot read it: choose the vocabulary that "
            "made it, or preprocess the FASTA again"
        )
    if model_size != len(vocabulary):
        raise InputError(
            f"model.vocab_size = {model_size} but data.vocabulary = {vocabulary.name!r} has "
            f"{len(vocabulary)} tokens: set model.vocab_size = {len(vocabulary)}"
        )
