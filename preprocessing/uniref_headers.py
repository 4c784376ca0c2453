"""What UniRef headers say of a cluster: `>UniRef50_P12345 Name n=3 Tax=… TaxID=9606 RepID=X_Y`.

n is the number of the cluster's members, TaxID the taxon that they have in common, RepID the
representative member (https://www.uniprot.org/help/fasta-headers). It is kept in one column of
texts while records are made: 4 bytes of n, 4 of TaxID, both big-endian and 0 where there is none,
then RepID; or nothing, for a header that is not UniRef's.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.columns import gather, parts, to_binary

METADATA_FIELDS = (
    pa.field("cluster_size", pa.uint32()),
    pa.field("tax_id", pa.uint32()),
    pa.field("rep_id", pa.string()),
)
"""Columns of a shard; null in what is not UniRef's, or where a header does not say."""

_NUMBERS = np.dtype([("cluster_size", ">u4"), ("tax_id", ">u4")])
_WORD = 8  # bytes before a '=' that are looked at
_DIGITS = 11  # one more than the greatest 32-bit number has
_POWERS = 10 ** np.arange(_DIGITS, dtype=np.int64)[::-1]
_BLANK, _EQUALS, _ZERO = 32, ord("="), ord("0")


def pack_metadata(ids: pa.Array, descriptions: pa.Array) -> pa.Array:
    """Find a cluster's size, taxon and representative in headers.

    Args:
        ids: binary [N].
        descriptions: binary [N], what follows the id in the header.

    Returns:
        Binary [N], see above.
    """
    offsets, values = parts(descriptions)
    first, last = int(offsets[0]), int(offsets[-1])
    bounds = offsets.astype(np.int64) - first + _WORD
    text = np.zeros(last - first + _WORD + _DIGITS, np.uint8)
    text[_WORD : _WORD + last - first] = values[first:last]

    equals = np.flatnonzero(text == _EQUALS)
    record = np.searchsorted(bounds, equals, side="right") - 1
    words = _windows(text, equals - _WORD, _WORD).view("<u8")[:, 0]
    numbers = np.zeros(len(ids), _NUMBERS)
    for name, field in ((b" n", "cluster_size"), (b" TaxID", "tax_id")):
        found = _is_after(words, name)
        numbers[field][record[found]] = _read_numbers(text, equals[found] + 1)

    found = _is_after(words, b" RepID")
    starts = bounds[1:].copy()  # the last one of a header counts
    starts[record[found]] = equals[found] + 1
    blanks = np.append(np.flatnonzero(text <= _BLANK), len(text))
    stops = np.minimum(blanks[np.searchsorted(blanks, starts)], bounds[1:])
    representatives = gather(text, starts, stops)

    is_uniref = pc.starts_with(ids, "UniRef").to_numpy(zero_copy_only=False)
    known = is_uniref & ((numbers["cluster_size"] > 0) | (stops > starts))
    sizes = np.append(0, np.cumsum(known * _NUMBERS.itemsize)).astype(np.int32)
    heads = to_binary(sizes, numbers[known].view(np.uint8))
    tails = pc.if_else(pa.array(known), representatives, pa.scalar(b"", pa.binary()))
    return pc.binary_join_element_wise(heads, tails, b"")


def unpack_metadata(packed: pa.Array) -> list[pa.Array]:
    """Return the columns `METADATA_FIELDS`, [N] each, of what `pack_metadata` returned."""
    offsets, values = parts(packed)
    known = np.diff(offsets) > 0
    starts = offsets[:-1].astype(np.int64)
    numbers = np.zeros(len(packed), _NUMBERS)
    if known.any():
        heads = _windows(values, starts[known], _NUMBERS.itemsize)
        numbers[known] = heads.view(_NUMBERS)[:, 0]
    representatives = gather(values, starts + known * _NUMBERS.itemsize, offsets[1:])
    absent = np.diff(parts(representatives)[0]) == 0
    columns = []
    for field in METADATA_FIELDS[:2]:
        column = numbers[field.name].astype(np.uint32)
        columns.append(pa.array(column, mask=column == 0))
    names = pc.if_else(pa.array(absent), pa.scalar(None, pa.binary()), representatives)
    return [*columns, names.cast(pa.string())]


def _windows(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Return the pieces, uint8 [N, length], of a text that begin at `starts`."""
    return np.lib.stride_tricks.sliding_window_view(text, length)[starts]


def _is_after(words: np.ndarray, name: bytes) -> np.ndarray:
    """Return which words, little-endian uint64 [N], end with `name`: their row numbers."""
    shift = np.uint64(8 * (_WORD - len(name)))
    return np.flatnonzero(words >> shift == np.uint64(int.from_bytes(name, "little")))


def _read_numbers(text: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the decimal numbers, int64 [N], that begin at `starts`; 0 for none or too great."""
    digits = _windows(text, starts, _DIGITS) - np.uint8(_ZERO)
    is_digit = np.logical_and.accumulate(digits <= 9, axis=1)
    count = is_digit.sum(axis=1)
    # What follows the number weighs nothing; the number itself is too great by a power of ten.
    value = (digits * is_digit).astype(np.int64) @ _POWERS // 10 ** (_DIGITS - count)
    return np.where(value < 2**32, value, 0) * (count < _DIGITS)
