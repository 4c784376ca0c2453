"""Micro-batches: right tokens, the same for any number of ranks, restorable."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hpc.config import DataConfig, Recipe
from hpc.data import Batcher, MicroBatch, StreamLoader, check_vocabulary, open_streams
from preprocessing.columns import map_file
from preprocessing.errors import InputError
from preprocessing.records import RecordSet
from preprocessing.vocabulary import PROTTRANS_BERT


def same(batch: MicroBatch) -> MicroBatch:
    return batch


def loader(recipe: Recipe, rank: int = 0, size: int = 1) -> StreamLoader:
    records = RecordSet(Path(recipe.data.records))
    batcher = Batcher(records, PROTTRANS_BERT, recipe.data, recipe.train.seed)
    streams = open_streams(batcher, recipe.data, recipe.train, len(records), rank, size)
    return StreamLoader(streams, same)


def fingerprint(batch: MicroBatch) -> tuple[object, ...]:
    """Everything that a step sees of a micro-batch."""
    return (
        batch.stream,
        *batch.numbers.tolist(),
        batch.tokens.numpy().tobytes(),
        *batch.lengths.tolist(),
        *batch.seeds.tolist(),
    )


def step_of_all_ranks(loaders: list[StreamLoader]) -> list[tuple[object, ...]]:
    return [fingerprint(batch) for one in loaders for batch in one.next_step()]


@pytest.fixture
def records(recipe: Recipe) -> RecordSet:
    return RecordSet(Path(recipe.data.records))


def test_tokens_are_the_residues_between_cls_and_sep(records: RecordSet) -> None:
    batcher = Batcher(records, PROTTRANS_BERT, DataConfig(records="", length=2000), seed=0)
    batch = batcher.pad(0, batcher.read(np.array([3, 1, 4]), np.zeros(3, np.int64)))
    assert batch.tokens.shape[1] % 8 == 0
    for row, length, number in zip(batch.tokens, batch.lengths, [3, 1, 4], strict=True):
        letters = [PROTTRANS_BERT.tokens[token] for token in row[:length]]
        sequence = records.record(number).sequence
        expected = ["X" if letter in "BJOUZ" else letter for letter in sequence]
        assert letters == ["[CLS]", *expected, "[SEP]"]
        assert set(row[length:].tolist()) <= {0}


def test_long_proteins_are_cropped_as_the_recipe_says(records: RecordSet) -> None:
    number = max(range(len(records)), key=lambda n: len(records.record(n).sequence))
    sequence = records.record(number).sequence
    numbers = np.full(20, number)
    epochs = np.arange(20)
    cropped = {}
    for long in ("crop-start", "crop-random"):
        config = DataConfig(records="", length=52, long=long)  # type: ignore[arg-type]
        batcher = Batcher(records, PROTTRANS_BERT, config, seed=0)
        batch = batcher.pad(0, batcher.read(numbers, epochs))
        assert set(batch.lengths.tolist()) == {52}
        cropped[long] = {
            "".join(PROTTRANS_BERT.tokens[token] for token in row[1:51]) for row in batch.tokens
        }
    assert cropped["crop-start"] == {sequence[:50]}
    assert len(cropped["crop-random"]) > 10
    assert all(window in sequence for window in cropped["crop-random"])


def test_any_world_size_sees_the_same_micro_batches(recipe: Recipe) -> None:
    worlds = [[loader(recipe, rank, size) for rank in range(size)] for size in (1, 2, 4)]
    for _ in range(25):  # more than an epoch: 25 * 32 samples of about 330
        alone, two, four = (step_of_all_ranks(world) for world in worlds)
        assert alone == two == four


def test_a_world_goes_on_where_another_world_size_stopped(recipe: Recipe) -> None:
    straight = loader(recipe)
    expected = [step_of_all_ranks([straight]) for _ in range(20)]
    two = [loader(recipe, rank, 2) for rank in range(2)]
    for step in range(7):
        assert step_of_all_ranks(two) == expected[step]
    cursors = [cursor for one in two for cursor in one.state_dict()["cursors"]]
    four = [loader(recipe, rank, 4) for rank in range(4)]
    for rank, one in enumerate(four):
        one.load_state_dict({"cursors": cursors[rank : rank + 1]})
    for step in range(7, 20):
        assert step_of_all_ranks(four) == expected[step]


def test_every_record_is_seen_once_an_epoch(recipe: Recipe, records: RecordSet) -> None:
    micro_batch = len(records) // 4 // 4  # four streams, four micro-batches a window
    train = replace(recipe.train, global_batch=4 * micro_batch, micro_batch=micro_batch)
    one = loader(replace(recipe, train=train))
    seen = [n for _ in range(4) for batch in one.next_step() for n in batch.numbers.tolist()]
    assert len(seen) == len(set(seen)) == 16 * micro_batch


def test_buckets_save_padding(recipe: Recipe) -> None:
    def padding(bucket_batches: int) -> float:
        data = replace(recipe.data, bucket_batches=bucket_batches)
        one = loader(replace(recipe, data=data))
        batches = [batch for _ in range(8) for batch in one.next_step()]
        slots = sum(batch.tokens.numel() for batch in batches)
        return 1 - sum(int(batch.lengths.sum()) for batch in batches) / slots

    assert padding(8) < 0.6 * padding(1)


def test_a_broken_shard_reaches_the_training_thread_as_an_input_error(recipe: Recipe) -> None:
    one = loader(recipe)
    one._streams[0]._batcher._records._shards = ["no-such-shard.arrow"] * 4
    with pytest.raises(InputError, match=r"no-such-shard\.arrow: the shard is missing"):
        one.next_step()


def test_a_rank_reads_only_the_shards_of_its_own_streams(
    recipe: Recipe, records: RecordSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 shards by key range, 4 streams by record: a stream lies in its shard and a neighbour."""
    opened: set[str] = set()

    def map_noting(path: Path) -> pa.Buffer:
        opened.add(path.name)
        return map_file(path)

    monkeypatch.setattr("preprocessing.records.map_file", map_noting)
    starts = np.cumsum([0] + [s["records"] for s in records.manifest["splits"]["train"]["shards"]])
    for rank in range(4):
        opened.clear()
        one = loader(recipe, rank, 4)
        for _ in range(15):  # more than an epoch
            one.next_step()
        one.close()
        first, last = rank * len(records) // 4, (rank + 1) * len(records) // 4 - 1
        shards = np.searchsorted(starts, [first, last], "right") - 1
        assert opened == {f"shard-{n:05d}.arrow" for n in range(shards[0], shards[1] + 1)}
        assert len(opened) < 4


def test_closing_ends_the_reading_thread(recipe: Recipe) -> None:
    one = loader(recipe)
    one.next_step()
    one.close()
    assert not one._thread.is_alive()


def test_a_vocabulary_of_another_size_is_refused(records: RecordSet) -> None:
    with pytest.raises(InputError, match=r"vocab_size = 31 but .* set model\.vocab_size = 30"):
        check_vocabulary(records, PROTTRANS_BERT, 31)


def test_records_that_hold_no_residues_are_refused(records: RecordSet) -> None:
    records.manifest["vocabulary"]["name"] = "bpe-10k"
    with pytest.raises(InputError, match="holds records of vocabulary 'bpe-10k', not residues"):
        check_vocabulary(records, PROTTRANS_BERT, 30)
