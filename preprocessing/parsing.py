"""The records of a unit, and where in its file stands what is refused."""

from __future__ import annotations

from collections.abc import Iterator

from preprocessing.fasta import FastaProblem, OnInvalid, Parsed, parse
from preprocessing.raw import BadInput
from preprocessing.sources import Chunk, UnitReader


def parsed_chunks(
    reader: UnitReader, path: str, on_invalid: OnInvalid
) -> Iterator[tuple[Chunk, Parsed]]:
    """Yield each chunk of a unit and its records.

    Args:
        reader: of the unit.
        path: its file.
        on_invalid: see `fasta.parse`.

    Raises:
        BadInput: for what is refused, with file, line and record.
    """
    for chunk in reader.chunks():
        try:
            parsed = parse(chunk.text, on_invalid)
        except FastaProblem as problem:
            line = reader.line_number(chunk, problem.position)
            name = "" if problem.record_id is None else f", record '{problem.record_id}'"
            raise BadInput(f"{path}, line {line:,}{name}: {problem}") from problem
        yield chunk, parsed
