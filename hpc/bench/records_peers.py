"""Other formats and their libraries: programs that write records from FASTA, and read them back.

    python -m hpc.bench.records_peers write lmdb FASTA OUTPUT
    python -m hpc.bench.records_peers read lmdb OUTPUT

They do less than `prothpc preprocess`: no validation, no shuffle, no de-duplication, no checksums,
nothing is synced to the disk. All take records from the same parser, in portions, and store ids and
residues as bytes where the format has them.
"""

import importlib.util
import json
import os
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hpc.bench.records_read import BATCH, Counted, timed

_READ_BYTES = 8 * 2**20
_LMDB_BYTES = 2**36
_MDS_SHARD_BYTES = 2**26

Portion = tuple[list[bytes], list[bytes]]
"""Ids and sequences."""


def parse(fasta: Path) -> Iterator[Portion]:
    """Yield the records of a FASTA in portions: the plain way in Python, by splitting."""
    with fasta.open("rb") as file:
        rest = b""
        while block := file.read(_READ_BYTES):
            block = rest + block
            end = block.rfind(b"\n>")
            if end < 0:
                rest = block
                continue
            yield _split(block[:end])
            rest = block[end + 1 :]
        if rest:
            yield _split(rest)


def _split(text: bytes) -> Portion:
    parts = [record.partition(b"\n") for record in text.removeprefix(b">").split(b"\n>")]
    return [head.split(None, 1)[0] for head, _, _ in parts], [
        body.replace(b"\n", b"") for _, _, body in parts
    ]


def write_parser_only(fasta: Path, output: Path) -> None:
    """Nothing is written: what the parser takes of the time of the others."""
    for _ in parse(fasta):
        pass


def write_arrow(fasta: Path, output: Path) -> None:
    """Arrow IPC, `list<uint8>` column."""
    import pyarrow as pa

    schema = pa.schema({"id": pa.binary(), "tokens": pa.list_(pa.uint8())})
    with pa.ipc.new_file(str(output), schema) as writer:
        for ids, sequences in parse(fasta):
            values = np.frombuffer(b"".join(sequences), np.uint8)
            tokens = pa.ListArray.from_arrays(_offsets(sequences, np.int32), pa.array(values))
            writer.write_batch(pa.record_batch([pa.array(ids), tokens], schema=schema))


def write_megatron(fasta: Path, output: Path) -> None:
    """All residues in one file, sizes and offsets in another, as Megatron's indexed data sets."""
    lengths = []
    output.mkdir()
    with (output / "data.bin").open("wb") as file:
        for _, sequences in parse(fasta):
            file.writelines(sequences)
            lengths.append(np.fromiter(map(len, sequences), np.int32, len(sequences)))
    sizes = np.concatenate(lengths)
    np.save(output / "sizes.npy", sizes)
    np.save(output / "offsets.npy", np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))


def write_h5py(fasta: Path, output: Path) -> None:
    """HDF5's best case: one growing array of residues and one of lengths."""
    import h5py

    with h5py.File(output, "w") as file:
        tokens = file.create_dataset("tokens", (0,), np.uint8, maxshape=(None,), chunks=(2**20,))
        lengths = file.create_dataset("lengths", (0,), np.int32, maxshape=(None,), chunks=(2**16,))
        for _, sequences in parse(fasta):
            values = np.frombuffer(b"".join(sequences), np.uint8)
            sizes = np.fromiter(map(len, sequences), np.int32, len(sequences))
            for dataset, new in ((tokens, values), (lengths, sizes)):
                old = len(dataset)
                dataset.resize(old + len(new), axis=0)
                dataset[old:] = new


def write_lmdb(fasta: Path, output: Path) -> None:
    """LMDB under numbers, without sync."""
    import lmdb

    number = 0
    with lmdb.open(str(output), map_size=_LMDB_BYTES, sync=False, metasync=False) as database:
        for _, sequences in parse(fasta):
            keys = (n.to_bytes(8, "big") for n in range(number, number + len(sequences)))
            with database.begin(write=True) as transaction, transaction.cursor() as cursor:
                cursor.putmulti(zip(keys, sequences, strict=True), append=True)
            number += len(sequences)


def write_mds(fasta: Path, output: Path) -> None:
    """mosaicml-streaming's MDS: bytes, no compression, no hashes."""
    columns = {"id": "bytes", "tokens": "bytes"}
    writer = _streaming().MDSWriter
    with writer(out=str(output), columns=columns, size_limit=_MDS_SHARD_BYTES) as out:
        for ids, sequences in parse(fasta):
            for name, sequence in zip(ids, sequences, strict=True):
                out.write({"id": name, "tokens": sequence})


def write_datasets(fasta: Path, output: Path) -> None:
    """Hugging Face datasets, from a generator of lists of numbers."""
    import datasets

    def samples() -> Iterator[dict[str, Any]]:
        for ids, sequences in parse(fasta):
            for name, sequence in zip(ids, sequences, strict=True):
                yield {"id": name, "tokens": np.frombuffer(sequence, np.uint8)}

    features = datasets.Features(
        {"id": datasets.Value("binary"), "tokens": datasets.List(datasets.Value("uint8"))}
    )
    cache = f"{output}.cache"
    made = datasets.Dataset.from_generator(samples, features=features, cache_dir=cache)
    made.save_to_disk(str(output))
    shutil.rmtree(cache)


def read_megatron(output: Path) -> Callable[[int], Iterator[Counted]]:
    """Views of the mapped file in random order, 256 joined to a batch."""
    values = np.memmap(output / "data.bin", np.uint8, "r").view(np.ndarray)
    offsets = np.load(output / "offsets.npy")

    def epoch(number: int) -> Iterator[Counted]:
        order = np.random.default_rng(number).permutation(len(offsets) - 1)
        for first in range(0, len(order), BATCH):
            rows = order[first : first + BATCH]
            starts, stops = offsets[rows].tolist(), offsets[rows + 1].tolist()
            views = [values[start:stop] for start, stop in zip(starts, stops, strict=True)]
            yield len(rows), len(np.concatenate(views))

    return epoch


def read_lmdb(output: Path) -> Callable[[int], Iterator[Counted]]:
    """Keys in random order, 256 joined to a batch."""
    import lmdb

    database = lmdb.open(str(output), readonly=True, lock=False, readahead=False)
    transaction = database.begin(buffers=True)
    count = database.stat()["entries"]

    def epoch(number: int) -> Iterator[Counted]:
        order = np.random.default_rng(number).permutation(count).tolist()
        for first in range(0, count, BATCH):
            keys = [n.to_bytes(8, "big") for n in order[first : first + BATCH]]
            residues = b"".join(map(transaction.get, keys))
            yield len(keys), len(residues)

    return epoch


def read_mds(output: Path) -> Callable[[int], Iterator[Counted]]:
    """Epochs of mosaicml-streaming with its own shuffle, 256 joined to a batch."""
    data = _streaming().StreamingDataset(
        local=str(output), shuffle=True, batch_size=BATCH, shuffle_seed=1
    )

    def epoch(_: int) -> Iterator[Counted]:
        batch = []
        for sample in data:
            batch.append(sample["tokens"])
            if len(batch) == BATCH:
                yield len(batch), len(b"".join(batch))
                batch = []

    return epoch


def read_mds_items(output: Path) -> Callable[[int], Iterator[Counted]]:
    """Items of mosaicml-streaming's local data set in random order, 256 joined to a batch."""
    data = _streaming().LocalDataset(str(output))

    def epoch(number: int) -> Iterator[Counted]:
        order = np.random.default_rng(number).permutation(len(data)).tolist()
        for first in range(0, len(order), BATCH):
            rows = [data[row]["tokens"] for row in order[first : first + BATCH]]
            yield len(rows), len(b"".join(rows))

    return epoch


def read_datasets(output: Path) -> Callable[[int], Iterator[Counted]]:
    """Hugging Face datasets as Arrow tables of 256 random rows: its fastest way."""
    import datasets

    data = datasets.load_from_disk(str(output)).with_format("arrow")

    def epoch(number: int) -> Iterator[Counted]:
        order = np.random.default_rng(number).permutation(len(data))
        for first in range(0, len(order), BATCH):
            column = data[order[first : first + BATCH]]["tokens"].combine_chunks()
            yield len(column), len(column.flatten())

    return epoch


WRITERS = {
    "parser": write_parser_only,
    "arrow": write_arrow,
    "megatron": write_megatron,
    "h5py": write_h5py,
    "lmdb": write_lmdb,
    "mds": write_mds,
    "datasets": write_datasets,
}
READERS = {
    "megatron": read_megatron,
    "lmdb": read_lmdb,
    "mds": read_mds,
    "mds-items": read_mds_items,
    "datasets": read_datasets,
}
LIBRARIES = {"h5py": "h5py", "lmdb": "lmdb", "mds": "streaming", "datasets": "datasets"}
"""Module that a format needs beside numpy and pyarrow."""

PACKAGES = (
    "lmdb", "h5py", "mosaicml-streaming", "datasets",
    # What these import at once, of what they depend on; cloud storage and the like is left out,
    # and so is torch, which is here already.
    "aiohttp", "brotli", "catalogue", "cramjam", "dill", "filelock", "fsspec", "httpx",
    "huggingface-hub", "multiprocess", "pandas", "python-snappy", "pyyaml", "regex", "requests",
    "tokenizers", "tqdm", "transformers", "zstd", "zstandard",
)  # fmt: skip


def _offsets(sequences: list[bytes], dtype: type[np.integer]) -> np.ndarray:
    sizes = np.fromiter(map(len, sequences), np.int64, len(sequences))
    return np.concatenate([[0], np.cumsum(sizes)]).astype(dtype)


def _streaming() -> types.ModuleType:
    """Return streaming.base without the package around it, which wants torchvision."""
    if "streaming" not in sys.modules:
        spec = importlib.util.find_spec("streaming")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        package = types.ModuleType("streaming")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["streaming"] = package
    return importlib.import_module("streaming.base")


def main() -> None:
    """Write or read as the arguments say; print seconds, records and residues."""
    # Libraries installed for the occasion come last: what is here already stays what it is.
    sys.path.append(os.environ.get("PROTHPC_PEERS", ""))
    what, name, *paths = sys.argv[1:]
    if what == "write":
        fasta, output = map(Path, paths)
        began = time.perf_counter()
        WRITERS[name](fasta, output)
        print(json.dumps({"seconds": time.perf_counter() - began}))
    else:
        print(json.dumps(timed(READERS[name](Path(paths[0])))))


if __name__ == "__main__":
    main()
