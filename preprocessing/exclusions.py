"""What is to be left out of a record set, as the files of `preprocess --exclude` name it.

A file is a table of `prothpc filter` (Parquet), a FASTA, or a list of ids. Where it gives
sequences or their keys, records are left out by key, under whatever id they stand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from preprocessing.columns import key_array, parts
from preprocessing.fasta import OnInvalid
from preprocessing.formats import kind_of
from preprocessing.keys import KEY_BYTES, hash_residues
from preprocessing.keysets import KeySet
from preprocessing.parsing import parsed_chunks
from preprocessing.raw import BadInput
from preprocessing.sources import UNIT_BYTES, UnitReader, check_fit, cut, examine

_PARQUET_MAGIC = b"PAR1"
_ROWS_PER_BATCH = 2**16
_SHOWN_CHARACTERS = 40
_HEX_DIGITS = 2 * KEY_BYTES

Keys = np.ndarray
"""uint8 [N, 16]: keys of records, or the xxh3-128 of ids."""


class Exclusions:
    """Keys and ids of what is left out."""

    def __init__(self, keys: KeySet, ids: KeySet) -> None:
        """Take the keys, and the xxh3-128 of the ids."""
        self._keys, self._ids = keys, ids

    def by_key(self, keys: np.ndarray) -> np.ndarray:
        """Return bool [N]: which of the keys, uint8 [N, 16], are left out."""
        return self._keys.contains(keys)

    def by_id(self, ids: pa.Array) -> np.ndarray:
        """Return bool [N]: which of the ids, binary [N], are left out."""
        if len(self._ids) == 0:
            return np.zeros(len(ids), bool)
        return self._ids.contains(_hash_ids(ids))


def write_exclusions(directory: Path, files: Sequence[Path], on_invalid: OnInvalid) -> None:
    """Read exclusion files and write what `map_exclusions` maps.

    Args:
        directory: where to.
        files: as the user gave them.
        on_invalid: how the sequences of a FASTA are read: as those of the input are.

    Raises:
        BadInput: if a file has no form that is known.
    """
    keys, ids = [np.empty((0, KEY_BYTES), np.uint8)], [np.empty((0, KEY_BYTES), np.uint8)]
    for path in files:
        for of_records, of_ids in _read(path, on_invalid):
            keys.append(of_records)
            ids.append(of_ids)
    for path, found in zip(_set_paths(directory), (keys, ids), strict=True):
        KeySet.save(path, np.concatenate(found))


def map_exclusions(directory: Path) -> Exclusions:
    """Map what `write_exclusions` wrote."""
    return Exclusions(*map(KeySet.load, _set_paths(directory)))


def _set_paths(directory: Path) -> tuple[Path, Path]:
    return directory / "exclude-keys.npy", directory / "exclude-ids.npy"


def _read(path: Path, on_invalid: OnInvalid) -> Iterator[tuple[Keys, Keys]]:
    with path.open("rb") as file:
        head = file.read(1024)
    if head.startswith(_PARQUET_MAGIC):
        return _read_table(path)
    if head.lstrip(b"\r\n").startswith(b">") or kind_of(head) != "plain":
        return _read_fasta(path, on_invalid)
    return _read_list(path)


def _hash_ids(ids: pa.Array) -> Keys:
    return hash_residues(*parts(ids))


def _no_keys() -> Keys:
    return np.empty((0, KEY_BYTES), np.uint8)


def _read_fasta(path: Path, on_invalid: OnInvalid) -> Iterator[tuple[Keys, Keys]]:
    source = examine(path)
    stretches = []
    for unit in cut([source]):
        reader = UnitReader(source, unit, block_bytes=UNIT_BYTES)
        for _, parsed in parsed_chunks(reader, source.path, on_invalid):
            yield hash_residues(*parts(parsed.sequences))[~parsed.invalid], _no_keys()
        stretches.append(reader.stretch)
    check_fit(source, stretches)


def _read_list(path: Path) -> Iterator[tuple[Keys, Keys]]:
    ids: list[bytes] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            words = line.split()
            if len(words) > 1 or b"\0" in line:
                shown = line[:_SHOWN_CHARACTERS].rstrip().decode("utf-8", "backslashreplace")
                raise BadInput(
                    f"{path}, line {number:,}: {shown!r} is no id: --exclude takes a table of "
                    "'prothpc filter' (Parquet), a FASTA, or a text with one id a line"
                )
            ids += words
            if len(ids) == _ROWS_PER_BATCH:
                yield _no_keys(), _hash_ids(pa.array(ids, pa.binary()))
                ids = []
    yield _no_keys(), _hash_ids(pa.array(ids, pa.binary()))


def _read_table(path: Path) -> Iterator[tuple[Keys, Keys]]:
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
        columns = {name for name in ("key", "id") if name in table.schema_arrow.names}
        if not columns:
            raise BadInput(
                f"{path}: has neither a column 'key' nor a column 'id', but "
                f"{', '.join(table.schema_arrow.names)}: give a table of 'prothpc filter'"
            )
        for batch in table.iter_batches(_ROWS_PER_BATCH, columns=sorted(columns)):
            yield _keys_of_table(path, batch)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path}: the Parquet file is damaged ({error}): write it again") from error


def _keys_of_table(path: Path, batch: pa.RecordBatch) -> tuple[Keys, Keys]:
    """Return the keys of the rows that have one, and the hashes of the other rows' ids."""
    without = np.ones(len(batch), bool)
    keys = _no_keys()
    if "key" in batch.schema.names:
        column = batch.column("key")
        without = column.is_null().to_numpy(zero_copy_only=False)
        keys = _binary_keys(path, column.drop_null())
    if "id" not in batch.schema.names:
        return keys, _no_keys()
    ids = batch.column("id").filter(pa.array(without)).drop_null()
    return keys, _hash_ids(ids.cast(pa.large_string()))


def _binary_keys(path: Path, column: pa.Array) -> Keys:
    if column.type == pa.binary(KEY_BYTES):
        return key_array(column)
    values = column.to_pylist()
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            values = [bytes.fromhex(value) for value in values]
        return key_array(pa.array(values, pa.binary(KEY_BYTES)))
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise BadInput(
            f"{path}: a key has {KEY_BYTES} bytes, or {_HEX_DIGITS} hexadecimal digits "
            f"({error}): give a table of 'prothpc filter'"
        ) from error
