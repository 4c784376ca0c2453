"""FASTA text to ids and residues, a chunk at a time, in NumPy and Arrow operations.

What is accepted: upper- and lower-case letters A to Z in lines of any length; LF or CRLF line
ends; blank lines; blanks at line ends; stop signs (`*`) after the last residue. The id is the first
word of the header. Everything else is refused with its place, or masked or dropped on request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from preprocessing.columns import gather, parts, take, to_binary
from preprocessing.uniref_headers import pack_metadata

OnInvalid = Literal["error", "mask", "drop"]

_NEWLINE, _RETURN, _TAB, _SPACE = 10, 13, 9, 32
_HEADER, _STOP, _MASK = ord(">"), ord("*"), ord("X")
_WINDOW = 32  # bytes of a header that are searched at once for the end of its id
_FIRST_LETTER, _LAST_LETTER, _FIRST_LOWER, _LETTERS = ord("A"), ord("Z"), ord("a"), 26
_FEW = 16  # one in so many: fewer are treated one by one
_BLANKS = (_SPACE, _TAB, _RETURN)

_HINTS = {
    "*": "a stop is allowed only at the end of a sequence: translate without stops or split there",
    "-": "remove the gaps of an alignment first (seqkit seq -g)",
    ".": "remove the gaps of an alignment first (seqkit seq -g -G .)",
    " ": "remove the blanks inside and before the sequence lines",
    "\t": "remove the blanks inside and before the sequence lines",
    ";": "comment lines are not read: remove them (grep -v '^;')",
    "+": "this looks like FASTQ: convert it first (seqkit fq2fa)",
    ">": "a header must start at the beginning of its line",
    "\r": "convert the line ends first (tr '\\r' '\\n')",
    "\0": "this is a binary file, not FASTA text",
}
_HINT_DIGIT = "remove position numbers from the sequence lines"
_HINT_NOT_ASCII = "a residue is one ASCII letter: convert the file to plain text"
_HINT_OTHER = "a residue is one of the letters A to Z"


class FastaProblem(Exception):
    """Something in a chunk that is refused; the caller knows the file and adds it and the line."""

    def __init__(self, position: int, record_id: str | None, what: str) -> None:
        super().__init__(what)
        self.position = position
        """Byte of the chunk at which it stands."""
        self.record_id = record_id


@dataclass(frozen=True)
class Parsed:
    """The N records of a chunk."""

    ids: pa.Array
    """binary [N], valid UTF-8."""
    sequences: pa.Array
    """binary [N], capitals A to Z in every record that is not `invalid`."""
    invalid: np.ndarray
    """bool [N], records to be dropped; all False unless `on_invalid` is "drop"."""
    changed: dict[str, int]
    """How many residues were upper-cased or masked, and how many stops were stripped."""
    metadata: pa.Array | None = None
    """binary [N], of the headers, see `uniref_headers`; None if it is not wanted."""

    def take(self, rows: np.ndarray) -> Parsed:
        """Return some of the records."""
        return Parsed(
            take(self.ids, rows),
            take(self.sequences, rows),
            self.invalid[rows],
            self.changed,
            None if self.metadata is None else take(self.metadata, rows),
        )


def parse(
    text: np.ndarray, on_invalid: OnInvalid = "error", *, keep_metadata: bool = False
) -> Parsed:
    """Parse whole records.

    Args:
        text: uint8 [B]; starts with the `>` of a header, ends with a newline, B < 2**31.
        on_invalid: what to do with a record that holds something other than residues: "error"
            refuses it, "mask" writes X there, "drop" marks the record (an empty one too).
        keep_metadata: whether to look for UniRef's metadata in the headers.

    Raises:
        FastaProblem: for the first thing in the chunk that is refused.
    """
    lines = _Lines(text)
    ids = gather(text, lines.id_starts, lines.id_stops)
    residues = _residues(text, lines)
    result = _clean(residues, on_invalid)
    _refuse_first(
        [
            _missing_id(lines),
            _id_not_utf8(lines, ids),
            _empty_record(lines, result, on_invalid),
            _bad_letter(lines, residues, result) if on_invalid == "error" else None,
        ],
        lines,
        ids,
    )
    invalid = np.zeros(len(ids), bool)
    if on_invalid == "drop":
        invalid[result.bad_records] = True
        invalid |= np.diff(parts(result.sequences)[0]) == 0
    metadata = None
    if keep_metadata:
        metadata = pack_metadata(ids, gather(text, lines.id_stops, lines.header_stops))
    return Parsed(ids, result.sequences, invalid, result.changed, metadata)


class _Lines:
    """Where the headers, ids and sequence lines of a chunk begin and end (byte positions)."""

    def __init__(self, text: np.ndarray) -> None:
        stops = np.flatnonzero(text == _NEWLINE)
        starts = np.zeros_like(stops)
        starts[1:] = stops[:-1] + 1
        is_header = text[starts] == _HEADER

        header_lines = np.flatnonzero(is_header)
        self.headers = starts[header_lines]
        """Position of each record's `>`."""
        self.header_stops = stops[header_lines]
        self.id_starts = self.headers + 1
        self.id_stops = _first_blanks(text, self.id_starts)
        sequence_lines = np.flatnonzero(~is_header)
        self.starts = starts[sequence_lines]
        self.stops = stops[sequence_lines] - (text[stops[sequence_lines] - 1] == _RETURN)
        self.first_line = np.append(
            header_lines - np.arange(len(header_lines)), len(sequence_lines)
        )
        """[N + 1]: number of the first sequence line of each record, then their total."""

    def position(self, line_offsets: np.ndarray, residue: int) -> int:
        """Return the byte position of a residue, given where each line's residues begin."""
        line = int(np.searchsorted(line_offsets, residue, side="right")) - 1
        return int(self.starts[line]) + residue - int(line_offsets[line])


def _first_blanks(text: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return where the first blank or control character stands, from each start on.

    `text` ends with a newline.
    """
    stops = np.empty_like(starts)
    rows, begins = np.arange(len(starts)), starts
    while len(rows):  # once, if no id is longer than a window
        found, places = _blanks_in_windows(text, begins)
        stops[rows[found]] = places[found]
        rows, begins = rows[~found], begins[~found] + _WINDOW
    return stops


def _blanks_in_windows(text: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Search the window from each start on; return where there is a blank, and its place.

    Windows are looked at as 32-bit masks, of which the highest bit stands for the first byte.
    """
    last_window = len(text) - _WINDOW
    inside = int(np.searchsorted(starts, last_window, side="right"))
    if inside < len(starts):
        tail = np.full(2 * _WINDOW, _NEWLINE, np.uint8)
        from_byte = max(last_window, 0)
        tail[: len(text) - from_byte] = text[from_byte:]
        found, places = _blanks_in_windows(text, starts[:inside])
        at_end, places_at_end = _blanks_in_windows(tail, starts[inside:] - from_byte)
        return np.append(found, at_end), np.append(places, places_at_end + from_byte)
    if inside == 0:
        return np.empty(0, bool), starts
    windows = np.ndarray(last_window + 1, f"V{_WINDOW}", text, strides=(1,))[starts]
    blank = windows.view(np.uint8).reshape(-1, _WINDOW) <= _SPACE
    mask = np.packbits(blank, axis=1).view(">u4")[:, 0].astype(np.float64)
    return mask > 0, starts + _WINDOW - np.frexp(mask)[1]


@dataclass(frozen=True)
class _Residues:
    """Residues of a chunk as they stand in the file, line ends removed."""

    values: np.ndarray  # uint8, read-only
    line_offsets: np.ndarray  # int32 [sequence lines + 1]
    record_offsets: np.ndarray  # int32 [N + 1]
    odd: np.ndarray  # int [odd], rising: places in values that hold no capital
    capitals: np.ndarray  # uint8, values with small letters made capital
    lowercase: int  # how many these were


def _residues(text: np.ndarray, lines: _Lines) -> _Residues:
    result = _join(text, lines)
    if np.isin(result.values[result.odd], _BLANKS).any():
        while True:  # blanks at line ends
            last = text[lines.stops - 1]
            blank = (lines.stops > lines.starts) & np.isin(last, _BLANKS)
            if not blank.any():
                break
            lines.stops = lines.stops - blank
        result = _join(text, lines)
    return result


def _join(text: np.ndarray, lines: _Lines) -> _Residues:
    line_offsets, values = parts(gather(text, lines.starts, lines.stops))
    values = capitals = values[: line_offsets[-1]]
    odd = np.empty(0, np.int64)
    lowercase = 0
    if len(values) and (values.min() < _FIRST_LETTER or values.max() > _LAST_LETTER):
        capitals, odd, lowercase = _capitals(values)
    return _Residues(values, line_offsets, line_offsets[lines.first_line], odd, capitals, lowercase)


def _capitals(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Return a text with small letters made capital, where it has no letters, and how many."""
    no_capital = _is_no_letter(values)
    count = int(np.count_nonzero(no_capital))
    if count > len(values) // _FEW:
        lower = values - np.uint8(_FIRST_LOWER) < _LETTERS  # uint8 wraps below a
        capitals = values - lower.view(np.uint8) * np.uint8(_FIRST_LOWER - _FIRST_LETTER)
        odd = np.flatnonzero(_is_no_letter(capitals))
        return capitals, odd, count - len(odd)
    odd = np.flatnonzero(no_capital)
    letters = values[odd] - np.uint8(_FIRST_LOWER - _FIRST_LETTER)
    lower = ~_is_no_letter(letters)
    capitals = values.copy()
    capitals[odd[lower]] = letters[lower]
    return capitals, odd[~lower], int(np.count_nonzero(lower))


def _is_no_letter(values: np.ndarray) -> np.ndarray:
    return values - np.uint8(_FIRST_LETTER) >= _LETTERS  # uint8 wraps below A


@dataclass(frozen=True)
class _Cleaned:
    sequences: pa.Array  # binary [N]
    changed: dict[str, int]
    bad: np.ndarray  # int [bad], places in _Residues.values that hold no residue
    bad_records: np.ndarray  # int [bad], record of each


def _clean(residues: _Residues, on_invalid: OnInvalid) -> _Cleaned:
    """Strip stops, mask; a chunk of letters passes through untouched."""
    changed = {
        "lowercase_residues": residues.lowercase, "stops_stripped": 0, "masked_residues": 0,
    }  # fmt: skip
    offsets, values, odd = residues.record_offsets, residues.capitals, residues.odd
    if len(odd) == 0:
        return _Cleaned(to_binary(offsets, values), changed, odd, odd)

    stops = offsets[1:].copy()
    ending = np.arange(len(stops))  # records that end with a stop sign
    while len(ending):
        ending = ending[stops[ending] > offsets[ending]]
        ending = ending[values[stops[ending] - 1] == _STOP]
        stops[ending] -= 1
    changed["stops_stripped"] = int((offsets[1:] - stops).sum())

    odd_records = np.searchsorted(offsets, odd, side="right") - 1
    inside = odd < stops[odd_records]  # not one of the stripped stops
    bad, bad_records = odd[inside], odd_records[inside]
    if on_invalid == "mask":
        values[bad] = _MASK
        changed["masked_residues"] = len(bad)
    return _Cleaned(gather(values, offsets[:-1], stops), changed, bad, bad_records)


Problem = tuple[int, int, str]
"""Byte position, number of the record in the chunk, and what is wrong."""


def _refuse_first(problems: list[Problem | None], lines: _Lines, ids: pa.Array) -> None:
    found = [problem for problem in problems if problem is not None]
    if found:
        position, record, what = min(found)
        has_id = lines.id_stops[record] > lines.id_starts[record]
        record_id = ids[record].as_py().decode("utf-8", "backslashreplace") if has_id else None
        raise FastaProblem(position, record_id, what)


def _missing_id(lines: _Lines) -> Problem | None:
    missing = np.flatnonzero(lines.id_stops == lines.id_starts)
    if len(missing) == 0:
        return None
    what = "the header has no id: write one right after the '>'"
    return int(lines.headers[missing[0]]), int(missing[0]), what


def _id_not_utf8(lines: _Lines, ids: pa.Array) -> Problem | None:
    values = parts(ids)[1]
    if len(values) == 0 or values.max() < 128:
        return None
    for record, value in enumerate(ids.to_pylist()):
        try:
            value.decode("utf-8")
        except UnicodeDecodeError:
            what = "the id is not UTF-8 text: convert the file (iconv -f latin1 -t utf-8)"
            return int(lines.headers[record]), record, what
    return None


def _empty_record(lines: _Lines, result: _Cleaned, on_invalid: OnInvalid) -> Problem | None:
    if on_invalid == "drop":
        return None
    empty = np.flatnonzero(np.diff(parts(result.sequences)[0]) == 0)
    if len(empty) == 0:
        return None
    what = "the record has no residues: remove it, or leave such records out with --on-invalid drop"
    return int(lines.headers[empty[0]]), int(empty[0]), what


def _bad_letter(lines: _Lines, residues: _Residues, result: _Cleaned) -> Problem | None:
    if len(result.bad) == 0:
        return None
    byte = int(residues.values[result.bad[0]])
    letter = chr(byte)
    if byte > 127:
        hint, shown = _HINT_NOT_ASCII, f"byte 0x{byte:02X}"
    else:
        hint = _HINT_DIGIT if letter.isdigit() else _HINTS.get(letter, _HINT_OTHER)
        shown = f"character {letter!r}"
    what = (
        f"{shown} is not a residue: {hint}, or let such records be masked or dropped "
        "(--on-invalid mask, --on-invalid drop)"
    )
    position = lines.position(residues.line_offsets, int(result.bad[0]))
    return position, int(result.bad_records[0]), what
