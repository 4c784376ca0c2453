"""Lanes: what a Transformer-XL reads. Continuous texts of proteins, cut into segments.

A micro-batch of a stream is a segment of each of its lanes, and the next micro-batch goes on where
it ended, so that the memory of a lane is of what came before in its text. A lane's text is
`[SEP] protein [SEP] protein [SEP] …`. Its proteins are those of the stream's sample sequence: a
lane that comes to the end of one takes the next that no lane has taken yet, so each record of the
stream is read once an epoch. A cursor says how many are taken, and for each lane its sample and
the place in it.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from hpc.config import DataConfig, TrainConfig
from hpc.data import Batcher
from hpc.streams import StreamOrder, streams_of_rank
from preprocessing.records import RecordSet
from preprocessing.vocabulary import Vocabulary

WHOLE = 2**31
"""Longer than any protein: lanes and their evaluation crop nothing."""

_SAMPLES_READ = 64
"""Samples read together."""

_NONE = -1
"""Number of the sample before the first."""


@dataclass(frozen=True)
class LaneBatch:
    """A segment of each lane of a stream."""

    stream: int
    """Stream that it comes from."""
    tokens: torch.Tensor
    """uint8 [B, L + 1]: the segment and the token that follows, which begins the next segment."""


class LaneStream:
    """The lanes of one stream.

    Args:
        order: the stream's sample sequence.
        batcher: reads proteins whole.
        separator: token id between proteins.
        lanes: texts side by side, the micro-batch.
        length: tokens of a segment.
    """

    def __init__(
        self, order: StreamOrder, batcher: Batcher, separator: int, lanes: int, length: int
    ) -> None:
        self._order = order
        self._batcher = batcher
        self._separator = np.array([separator], np.uint8)
        self._length = length
        self._window: tuple[int, list[np.ndarray]] = (0, [])  # its first sample, and texts
        self.cursor = (0, *(_NONE, 1) * lanes)

    @property
    def cursor(self) -> tuple[int, ...]:
        """Samples taken; then, lane by lane, its sample and the tokens of it that are read."""
        return (self._taken, *(number for lane in self._lanes for number in lane))

    @cursor.setter
    def cursor(self, cursor: tuple[int, ...]) -> None:
        self._taken, *numbers = cursor
        self._lanes = list(zip(numbers[::2], numbers[1::2], strict=True))
        self._texts: list[np.ndarray] = []

    def next(self) -> LaneBatch:
        """Return the next segment of each lane and move the cursor past it."""
        if not self._texts:
            self._texts = [self._begun(sample) for sample, _ in self._lanes]
        tokens = np.empty((len(self._lanes), self._length + 1), np.uint8)
        for lane, row in enumerate(tokens):
            self._fill(lane, row)
        return LaneBatch(self._order.stream, torch.from_numpy(tokens))

    def _fill(self, lane: int, row: np.ndarray) -> None:
        """Write a lane's last token and the `length` that follow."""
        sample, place = self._lanes[lane]
        text = self._texts[lane]
        row[0] = text[place - 1]
        filled = 1
        while filled < len(row):
            if place == len(text):
                sample, place = self._taken, 0
                self._taken += 1
                text = self._text(sample)
            part = text[place : place + len(row) - filled]
            row[filled : filled + len(part)] = part
            filled += len(part)
            place += len(part)
        self._lanes[lane] = (sample, place)
        self._texts[lane] = text

    def _begun(self, sample: int) -> np.ndarray:
        """Return the text that a lane is in when reading begins or goes on."""
        return self._separator if sample == _NONE else self._read(sample, 1)[0]

    def _text(self, sample: int) -> np.ndarray:
        """Return the tokens of a sample and the separator behind it."""
        first, texts = self._window
        if not first <= sample < first + len(texts):
            first, texts = self._window = sample, self._read(sample, _SAMPLES_READ)
        return texts[sample - first]

    def _read(self, first: int, count: int) -> list[np.ndarray]:
        samples = self._batcher.read(*self._order.samples(first, count))
        offsets = samples.offsets.tolist()
        return [
            np.concatenate([samples.tokens[start:end], self._separator])
            for start, end in pairwise(offsets)
        ]


def whole_proteins(
    records: RecordSet, vocabulary: Vocabulary, data: DataConfig, seed: int
) -> Batcher:
    """Return what reads proteins whole, a separator at both ends when they are padded.

    Args:
        records: training or held-out records.
        vocabulary: of the model.
        data: of the recipe.
        seed: of the run.
    """
    separated = replace(vocabulary, cls=vocabulary.sep)
    return Batcher(records, separated, replace(data, length=WHOLE, long="crop-start"), seed)


def open_lanes(
    records: RecordSet,
    vocabulary: Vocabulary,
    data: DataConfig,
    train: TrainConfig,
    rank: int,
    size: int,
) -> list[LaneStream]:
    """Return the lanes of one rank's streams; the arguments are those of `open_streams`."""
    batcher = whole_proteins(records, vocabulary, data, train.seed)
    separator = vocabulary.id_of(vocabulary.sep)
    orders = [
        StreamOrder(
            seed=train.seed,
            stream=stream,
            streams=train.streams,
            records=len(records),
            block_records=data.block_records,
            pool_blocks=data.pool_blocks,
        )
        for stream in streams_of_rank(train.streams, rank, size)
    ]
    return [
        LaneStream(order, batcher, separator, train.micro_batch, data.length) for order in orders
    ]
