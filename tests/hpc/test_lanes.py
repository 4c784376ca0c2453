"""Lanes: continuous texts, the same for any number of ranks, restorable; and their memory."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc.config import DataConfig, TrainConfig
from hpc.data import StreamLoader
from hpc.lane_memory import LaneMemory
from hpc.lanes import LaneBatch, LaneStream, open_lanes
from preprocessing.records import RecordSet
from preprocessing.vocabulary import PROTTRANS_BERT

SEP = PROTTRANS_BERT.id_of("[SEP]")
DATA = DataConfig(records="", length=24, block_records=16, pool_blocks=2)
TRAIN = TrainConfig(run_dir="", steps=1, global_batch=12, micro_batch=3)


@pytest.fixture
def records(record_set: Path) -> RecordSet:
    return RecordSet(record_set)


def lanes(records: RecordSet, rank: int = 0, size: int = 1, length: int = 24) -> list[LaneStream]:
    data = replace(DATA, length=length)
    return open_lanes(records, PROTTRANS_BERT, data, TRAIN, rank, size)


def same(batch: LaneBatch) -> LaneBatch:
    return batch


def loader(records: RecordSet, rank: int = 0, size: int = 1) -> StreamLoader:
    return StreamLoader(lanes(records, rank, size), same)


def step_of_all_ranks(loaders: list[StreamLoader]) -> list[tuple[int, bytes]]:
    batches = [batch for one in loaders for batch in one.next_step()]
    return [(batch.stream, batch.tokens.numpy().tobytes()) for batch in batches]


def texts(stream: LaneStream, segments: int) -> list[np.ndarray]:
    """The first segments of each lane, end to end."""
    batches = [stream.next().tokens.numpy() for _ in range(segments)]
    return list(np.concatenate([batch[:, :-1] for batch in batches], axis=1))


def proteins(text: np.ndarray) -> list[str]:
    """The whole proteins in a lane's text."""
    letters = "".join(PROTTRANS_BERT.tokens[token] if token != SEP else " " for token in text)
    assert letters[0] == " "
    return letters.split(" ")[1:-1]


def test_a_segment_begins_with_the_token_that_ended_the_one_before(records: RecordSet) -> None:
    stream = lanes(records)[0]
    batches = [stream.next().tokens for _ in range(20)]
    assert batches[0].shape == (3, 25)
    assert set(batches[0][:, 0].tolist()) == {SEP}
    for one, following in pairwise(batches):
        assert torch.equal(one[:, -1], following[:, 0])


def test_lanes_do_not_depend_on_where_segments_end(records: RecordSet) -> None:
    """Which lane takes which protein may: so one lane is compared."""
    alone = replace(TRAIN, global_batch=4, micro_batch=1)
    one, other = (
        open_lanes(records, PROTTRANS_BERT, replace(DATA, length=length), alone, 0, 1)[1]
        for length in (24, 60)
    )
    assert np.array_equal(texts(one, 50)[0], texts(other, 20)[0])


def test_each_record_of_a_stream_is_read_once_an_epoch_and_whole(records: RecordSet) -> None:
    stream = lanes(records)[2]
    count = len(records) // 4
    read: list[str] = []
    for text in texts(stream, 2 * count * 80 // 3 // 24):
        read += proteins(text)
    first, end = 2 * len(records) // 4, 3 * len(records) // 4
    table = str.maketrans("BJOUZ", "XXXXX")
    expected = [records.record(n).sequence.translate(table) for n in range(first, end)]
    assert set(read) == set(expected)
    epoch = sorted(read, key=read.count)
    # Lanes are at most a protein apart, so no record is read twice more than another.
    assert read.count(epoch[-1]) - read.count(epoch[0]) <= 1


def test_long_proteins_are_not_cropped(records: RecordSet) -> None:
    longest = max(len(records.record(n).sequence) for n in range(len(records)))
    found = [p for stream in lanes(records) for t in texts(stream, 400) for p in proteins(t)]
    assert max(map(len, found)) == longest > DATA.length


def test_segments_do_not_depend_on_the_number_of_ranks(records: RecordSet) -> None:
    for size in (2, 4):
        alone = [loader(records)]
        several = [loader(records, rank, size) for rank in range(size)]
        for _ in range(6):
            assert step_of_all_ranks(several) == step_of_all_ranks(alone)


def test_cursors_restore_lanes_on_another_number_of_ranks(records: RecordSet) -> None:
    reference = [loader(records)]
    expected = [step_of_all_ranks(reference) for _ in range(30)]
    two = [loader(records, rank, 2) for rank in range(2)]
    for step in range(17):
        assert step_of_all_ranks(two) == expected[step]
    cursors = [cursor for one in two for cursor in one.state_dict()["cursors"]]
    assert len(cursors[0]) == 1 + 2 * 3
    four = [loader(records, rank, 4) for rank in range(4)]
    for rank, one in enumerate(four):
        one.load_state_dict({"cursors": cursors[rank : rank + 1]})
    for step in range(17, 30):
        assert step_of_all_ranks(four) == expected[step]


def memory_of(value: float) -> tuple[torch.Tensor, ...]:
    return (torch.full((2, 4, 3), value), torch.full((2, 4, 3), -value))


def test_memory_counts_from_the_next_step_on() -> None:
    """A step may be computed twice: the second pass must not see what the first one left."""
    memory = LaneMemory("save", 4, 4)
    inputs = torch.zeros(2, 4, dtype=torch.int64)
    for value in (1.0, 2.0):
        memory.put(7, memory_of(value), inputs)
        assert memory.of(7) is None
    memory.advance()
    assert torch.equal(memory.of(7)[0], memory_of(2.0)[0])  # type: ignore[index]
    assert set(memory.tensors()) == {"7.0", "7.1"}
    memory.clear()
    assert memory.of(7) is None
    assert memory.tensors() == {}


def test_recomputation_keeps_twice_the_remembered_tokens() -> None:
    memory = LaneMemory("recompute", 5, 4)
    tokens = torch.randint(5, 25, (2, 24))
    for segment in tokens.split(4, dim=1):
        memory.put(1, memory_of(0.0), segment)
        memory.advance()
    (kept,) = memory.tensors().values()
    assert kept.dtype == torch.uint8
    assert torch.equal(kept.long(), tokens[:, -10:])


def test_without_memory_nothing_is_saved() -> None:
    assert LaneMemory("save", 0, 4).mode == "reset"
