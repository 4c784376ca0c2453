"""The records of a unit, and where in its file stands what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from preprocessing.fasta import FastaProblem, OnInvalid, Parsed, parse
from preprocessing.raw import BadInput
from preprocessing.sources import Chunk, UnitReader


def parsed_chunks(
    reader: UnitReader,
    path: str,
    on_invalid: OnInvalid,
    limit: int | None = None,
    *,
    keep_metadata: bool = False,
) -> Iterator[tuple[Chunk, Parsed]]:
    """Yield each chunk of a unit and its records.

    Args:
        reader: of the unit.
        path: its file.
        on_invalid: see `fasta.parse`.
        limit: records after which to stop; None: at the unit's end.
        keep_metadata: see `fasta.parse`.

    Raises:
        BadInput: for what is refused, with file, line and record.
    """
    left = limit
    for chunk in reader.chunks():
        if left is not None:
            chunk = _first_records(chunk, left)
        try:
            parsed = parse(chunk.text, on_invalid, keep_metadata=keep_metadata)
        except FastaProblem as problem:
            line = reader.line_number(chunk, problem.position)
            name = "" if problem.record_id is None else f", record '{problem.record_id}'"
            raise BadInput(f"{path}, line {line:,}{name}: {problem}") from problem
        yield chunk, parsed
        if left is not None:
            left -= len(parsed.ids)
            if left == 0:
                return


def _first_records(chunk: Chunk, count: int) -> Chunk:
    text = chunk.text
    headers = np.flatnonzero((text[1:] == ord(">")) & (text[:-1] == ord("\n"))) + 1
    return Chunk(text[: headers[count - 1]], chunk.offset) if len(headers) >= count else chunk
