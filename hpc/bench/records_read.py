"""How fast records are read back: a program that reads in one way and prints its rate.

    python -m hpc.bench.records_read packed RECORDS

`prothpc bench records` starts it, as it starts those of other formats (`records_peers`).
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.records import ROWS_PER_BATCH, RecordSet

BATCH = 256
"""Records in a packed batch."""

SECONDS = 3.0
"""A reader stops after so long; one that is through earlier begins again."""

_POOL_BLOCKS, _BLOCK_RECORDS = 4, 1024  # the defaults of a recipe
_STREAMS = 16
_DECOMPRESS_BYTES = 2**20
_ZSTD_LEVEL = 1

Counted = tuple[int, int]
"""Records and tokens or residues of a batch."""


def timed(epochs: Callable[[int], Iterator[Counted]]) -> dict[str, float]:
    """Read for a while, epoch after epoch, and return what was read in how many seconds.

    The first batch is not counted: it stands for opening files.
    """
    records = residues = epoch = 0
    began = None
    while True:
        for batch in epochs(epoch):
            now = time.perf_counter()
            if began is None:
                began = now
                continue
            records += batch[0]
            residues += batch[1]
            if now - began >= SECONDS:
                return {"seconds": now - began, "records": records, "residues": residues}
        epoch += 1


def packed(records: RecordSet) -> Callable[[int], Iterator[Counted]]:
    """Blocks in random order, pools of them shuffled, residues packed; every record once."""
    from hpc.streams import StreamOrder

    order = StreamOrder(
        seed=1,
        stream=0,
        streams=1,
        records=len(records),
        block_records=_BLOCK_RECORDS,
        pool_blocks=_POOL_BLOCKS,
    )
    portion = _POOL_BLOCKS * _BLOCK_RECORDS

    def epoch(number: int) -> Iterator[Counted]:
        for start in range(0, len(records), portion):
            position = number * len(records) + start
            numbers, _ = order.samples(position, min(portion, len(records) - start))
            picked = records.pick(numbers)
            residues = picked.residues()
            offsets = np.concatenate([[0], np.cumsum(picked.lengths)])
            for first in range(0, len(numbers), BATCH):
                bounds = offsets[first : first + BATCH + 1]
                batch = residues[bounds[0] : bounds[-1]]
                yield len(bounds) - 1, len(batch)

    return epoch


def scattered(records: RecordSet) -> Callable[[int], Iterator[Counted]]:
    """Any records of the whole set in one random order, 256 at a time, residues packed."""

    def epoch(number: int) -> Iterator[Counted]:
        order = np.random.default_rng(number).permutation(len(records))
        for first in range(0, len(order), BATCH):
            picked = records.pick(order[first : first + BATCH])
            yield len(picked), len(picked.residues())

    return epoch


def loader(
    records: RecordSet, micro_batch: int, *, masked: bool
) -> Callable[[int], Iterator[Counted]]:
    """Micro-batches as the trainer takes them, from one rank's 16 streams."""
    import torch

    from hpc.config import DataConfig, ObjectiveConfig, TrainConfig
    from hpc.data import Batcher, open_streams
    from hpc.tasks import MaskedLanguageModel
    from preprocessing.vocabulary import PROTTRANS_BERT

    torch.set_num_threads(1)
    data = DataConfig(records=str(records.directory))
    train = TrainConfig(
        run_dir="", steps=1, global_batch=_STREAMS * micro_batch, micro_batch=micro_batch
    )
    batcher = Batcher(records, PROTTRANS_BERT, data, train.seed)
    streams = open_streams(batcher, data, train, len(records), 0, 1)
    task = MaskedLanguageModel(ObjectiveConfig(), PROTTRANS_BERT)
    for stream in streams:
        stream.next()

    def epoch(_: int) -> Iterator[Counted]:
        for stream in streams:
            batch = stream.next()
            if masked:
                task.prepare(batch)
            yield len(batch.numbers), int(batch.lengths.sum())

    return epoch


def sequential_ids(records: RecordSet) -> Callable[[int], Iterator[Counted]]:
    """Compare all ids with one, as `prothpc inspect --id` does."""

    def epoch(_: int) -> Iterator[Counted]:
        for shard in range(records.num_shards):
            records.find_id("no such id", shard)
            yield len(records.numbers_in(shard)), 0

    return epoch


READERS: dict[str, Callable[[RecordSet], Callable[[int], Iterator[Counted]]]] = {
    "packed": packed,
    "scattered": scattered,
    "padded-8": lambda records: loader(records, 8, masked=False),
    "padded-64": lambda records: loader(records, 64, masked=False),
    "masked-8": lambda records: loader(records, 8, masked=True),
    "masked-64": lambda records: loader(records, 64, masked=True),
    "ids": sequential_ids,
}


def decompress(path: Path) -> dict[str, float]:
    """Decompress a file and do nothing with it, with the library that generation uses."""
    began = time.perf_counter()
    size = 0
    with path.open("rb") as file:
        stream: Any
        if path.suffix == ".gz":
            from isal import igzip

            stream = igzip.GzipFile(fileobj=file)
        else:
            import zstandard

            stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
        while block := stream.read(_DECOMPRESS_BYTES):
            size += len(block)
    return {"seconds": time.perf_counter() - began, "decompressed": size}


def bits(records: RecordSet) -> dict[str, float]:
    """Compress the residues of all batches as zstd-compressed shards do, and nothing else."""
    import pyarrow as pa

    began = time.perf_counter()
    compressed = 0
    codec = pa.Codec("zstd", compression_level=_ZSTD_LEVEL)
    for first in range(0, len(records), ROWS_PER_BATCH):
        part = records.read(first, min(first + ROWS_PER_BATCH, len(records)))
        residues = part.residues[part.offsets[0] : part.offsets[-1]]
        compressed += codec.compress(residues).size
    return {
        "seconds": time.perf_counter() - began,
        "residues": records.num_residues,
        "compressed": compressed,
    }


def main() -> None:
    """Do what the first argument says with the file or record set that the second names."""
    how, path = sys.argv[1], Path(sys.argv[2])
    if how == "decompress":
        result = decompress(path)
    elif how == "bits":
        result = bits(RecordSet(path))
    else:
        result = timed(READERS[how](RecordSet(path)))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
