"""How `prothpc inspect` shows a record set: lines for a terminal of 80 columns, and a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.errors import InputError
from preprocessing.inspect import (
    Contents,
    Found,
    find_id,
    find_key,
    find_number,
    measure,
    open_splits,
    read_run,
)
from preprocessing.parallel import Ranks
from preprocessing.records import SPLITS
from preprocessing.vocabulary import RESIDUES

_BAR_WIDTH = 44
_LENGTH_BINS = 16
_BIN_WIDTHS = (5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000)
_SHOWN_INPUTS = 6
_FASTA_COLUMNS = 60
_LEAST_SHOWN = 0.0001
_CENTRAL = 0.95
"""Share of the records that the length histogram resolves; longer ones are its last bin."""


def show(
    directory: Path,
    ranks: Ranks,
    *,
    split: str | None,
    sample: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Print totals, provenance and histograms of a record set on rank 0.

    Args:
        directory: the record set.
        ranks: the job; all its ranks must call this.
        split: whose lengths and amino acids are counted; None: of all.
        sample: about how many records these are counted in; 0: in all.
        plot: picture to draw.
        as_json: print JSON instead of text.

    Raises:
        InputError: if it is no readable record set.
    """
    splits = open_splits(directory, split)
    contents = measure(splits, ranks, sample)
    if ranks.rank:
        return
    if plot is not None:
        if not contents.records:
            raise InputError(f"{directory}: has no records, so there is nothing to draw")
        plot_contents(contents, str(directory), plot)
    manifest, run = splits[0].manifest, read_run(directory)
    if as_json:
        about = {name: value for name, value in manifest.items() if name != "splits"}
        print(json.dumps({"manifest": about, "run": run, "contents": contents.as_dict()}, indent=1))
        return
    print(totals_text(directory, manifest, run))
    print()
    print(contents_text(contents))


def show_records(
    directory: Path,
    ranks: Ranks,
    *,
    split: str | None,
    id: str | None,
    key: str | None,
    number: int | None,
    as_json: bool,
) -> None:
    """Print single records on rank 0, as FASTA or as JSON.

    Args:
        directory: the record set.
        ranks: the job; all its ranks must call this. They share the search for an id.
        split: where they are looked for; None: everywhere, and `number` in train.
        id: of the records.
        key: of the record, in hexadecimal.
        number: place of the record in the split.
        as_json: print JSON instead of FASTA.

    Raises:
        InputError: if there is no such record, or this is no readable record set.
    """
    splits = open_splits(directory, split)
    if id is not None:
        found, what = find_id(splits, id, ranks), f"id {id}"
    elif key is not None:
        found, what = find_key(splits, key), f"key {key}"
    else:
        assert number is not None
        found, what = [find_number(splits[0], number)], f"number {number}"
    if not found:
        where = f"the split {split}" if split else "any split"
        raise InputError(f"{directory}: no record with the {what} in {where}")
    if ranks.rank:
        return
    if as_json:
        print(json.dumps([one.as_dict() for one in found], indent=1))
        return
    for one in found:
        print(record_text(one))


def totals_text(directory: Path, manifest: dict[str, Any], run: dict[str, Any]) -> str:
    """Describe a record set: how much, of what, made how."""
    lines = [*_totals(directory, manifest), "", *_counts(manifest["totals"]), ""]
    return "\n".join([*lines, *_provenance(manifest, run)])


def contents_text(contents: Contents) -> str:
    """Draw the histograms of lengths and of letters."""
    if not contents.records:
        return "no records"
    low, middle, high = (contents.quantile(share) for share in (0.05, 0.5, 0.95))
    of_what = _of_what(contents)
    lines = [
        f"lengths of {of_what}",
        f"  median {middle:,}, 5 to 95 %: {low:,} to {high:,}, longest {contents.longest:,}",
        *_bars([(label, count / contents.records) for label, count in _length_bins(contents)]),
        "",
        f"amino acids in {of_what}",
        *_bars([(letter, share) for letter, share in _composition(contents)]),
    ]
    return "\n".join(lines)


def record_text(found: Found) -> str:
    """Return a record as FASTA, and where it lies in its header."""
    key, name, sequence = found.record
    header = (
        f">{name} number={found.number} split={found.split} length={len(sequence)} "
        f"key={key.hex()} file={found.file}"
    )
    starts = range(0, len(sequence), _FASTA_COLUMNS)
    return "\n".join([header, *(sequence[start : start + _FASTA_COLUMNS] for start in starts)])


def plot_contents(contents: Contents, title: str, picture: Path) -> None:
    """Draw lengths and composition.

    Args:
        contents: at least one record.
        title: of the picture.
        picture: file to write; its suffix says how (PNG, PDF, SVG).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    figure.suptitle(f"{title}: {_of_what(contents)}")
    lengths = np.arange(len(contents.lengths))
    present = lengths[contents.lengths > 0]
    edges = np.geomspace(max(present[0], 1), present[-1] + 1, 80)
    left.hist(lengths, bins=edges, weights=100 * contents.lengths / contents.records)
    left.set_xscale("log")
    left.axvline(contents.quantile(0.5), color="0.3", linestyle=":")
    left.annotate(
        f"median {contents.quantile(0.5):,}",
        (contents.quantile(0.5), 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -4),
        textcoords="offset points",
        va="top",
    )
    left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    left.set_xlabel("length, residues")
    left.set_ylabel("% of the records")
    letters, shares = zip(*_composition(contents), strict=True)
    bars = right.bar(letters, [100 * share for share in shares])
    labels = [f"{share:.1%}".rstrip("%") if share >= 0.0005 else "" for share in shares]
    right.bar_label(bars, labels, fontsize=7)
    right.set_ylabel("% of the residues")
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def _totals(directory: Path, manifest: dict[str, Any]) -> Iterator[str]:
    kept = manifest["totals"]["kept"]
    mean = kept["residues"] / kept["records"] if kept["records"] else 0
    yield (
        f"{directory}: {kept['records']:,} records, {kept['residues']:,} residues "
        f"({mean:.1f} a record)"
    )
    yield ""
    yield f"{'split':20}{'records':>16}{'residues':>20}{'shards':>8}{'MB':>12}"
    for split in SPLITS:
        amount, shards = manifest["totals"]["splits"][split], manifest["splits"][split]["shards"]
        size = sum(shard["bytes"] for shard in shards) / 1e6
        yield (
            f"  {split:18}{amount['records']:16,}{amount['residues']:20,}"
            f"{len(shards):8,}{size:12,.1f}"
        )


def _counts(totals: dict[str, Any]) -> Iterator[str]:
    """What was read, and what became of it; reasons that never applied are left out."""
    yield f"{'counted':20}{'records':>16}{'residues':>20}"
    rows = [("read", totals["read"])]
    rows += [(name, totals[name]) for name in ("windows",) if totals.get(name, {}).get("records")]
    rows += [("kept", totals["kept"])]
    rows += [(f"not: {name}", part) for name, part in totals["not_kept"].items() if part["records"]]
    for name, amount in rows:
        yield f"  {name.replace('_', ' '):18}{amount['records']:16,}{amount['residues']:20,}"
    changed = {name: count for name, count in totals["changed"].items() if count}
    if changed:
        yield "  " + ", ".join(
            f"{name.replace('_', ' ')}: {count:,}" for name, count in changed.items()
        )


def _provenance(manifest: dict[str, Any], run: dict[str, Any]) -> Iterator[str]:
    yield "inputs"
    inputs = manifest["inputs"]
    for entry in inputs[:_SHOWN_INPUTS]:
        yield f"  {entry['records']:,} records, {entry['bytes']:,} bytes, hash {entry['hash']}"
    if len(inputs) > _SHOWN_INPUTS:
        yield f"  and {len(inputs) - _SHOWN_INPUTS:,} more"
    paths = [str(entry.get("path")) for entry in run.get("plan", {}).get("inputs", [])]
    for path in paths[:_SHOWN_INPUTS]:
        yield f"  read from {path}"
    if len(paths) > _SHOWN_INPUTS:
        yield f"  and {len(paths) - _SHOWN_INPUTS:,} more"
    yield "options"
    yield from _wrapped([f"{name}={_plain(v)}" for name, v in manifest["options"].items()])
    yield "made"
    if not run:
        yield "  unknown: run.json is missing or damaged"
        return
    hosts = run.get("hosts", [])
    ranks = run.get("ranks", 0)
    yield (
        f"  {run.get('started')}, in {run.get('seconds', 0):,.1f} s, by {ranks} "
        f"rank{'' if ranks == 1 else 's'} on {', '.join(hosts[:3])}"
        + (f" and {len(hosts) - 3} more hosts" if len(hosts) > 3 else "")
    )
    yield from _wrapped([f"{name} {v}" for name, v in run.get("software", {}).items()])


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wrapped(words: Sequence[str], columns: int = 78) -> Iterator[str]:
    """Lines of words that are not cut."""
    line = " "
    for word in words:
        if len(line) + 2 + len(word) > columns and line.strip():
            yield line
            line = " "
        line += f" {word}" if not line.strip() else f"  {word}"
    if line.strip():
        yield line


def _of_what(contents: Contents) -> str:
    if contents.records == contents.of:
        return f"all {contents.of:,} records"
    return f"a sample of {contents.records:,} of {contents.of:,} records"


def _length_bins(contents: Contents) -> list[tuple[str, int]]:
    """Bins of one width, a round one, as far as most records reach, and one for the rest."""
    first, last = int(np.flatnonzero(contents.lengths)[0]), contents.quantile(_CENTRAL)
    width = next((w for w in _BIN_WIDTHS if (last - first) / w < _LENGTH_BINS), _BIN_WIDTHS[-1])
    start, end = first // width * width, last // width * width + width
    bins = [
        (f"{low:,} to {low + width - 1:,}", int(contents.lengths[low : low + width].sum()))
        for low in range(start, end, width)
    ]
    beyond = int(contents.lengths[end:].sum())
    return [*bins, (f"{end:,} or more", beyond)] if beyond else bins


def _composition(contents: Contents) -> list[tuple[str, float]]:
    """Letters that occur and their shares, the most frequent first."""
    shares = contents.letters / contents.letters.sum()
    order = [number for number in np.argsort(-shares, kind="stable").tolist() if shares[number]]
    return [(RESIDUES[number], float(shares[number])) for number in order]


def _bars(rows: list[tuple[str, float]]) -> Iterator[str]:
    """Horizontal bars, the longest as wide as there is room."""
    labels = max(len(label) for label, _ in rows)
    most = max(share for _, share in rows)
    eighths = (sys.stdout.encoding or "").lower().startswith("utf")
    for label, share in rows:
        units = share / most * _BAR_WIDTH
        whole, rest = divmod(round(units * 8), 8)
        bar = "█" * whole + " ▏▎▍▌▋▊▉"[rest] if eighths else "#" * round(units)
        percent = f"{share:8.2%}" if share >= _LEAST_SHOWN else f"{f'< {_LEAST_SHOWN:.2%}':>8}"
        yield f"  {label:>{labels}}  {bar:{_BAR_WIDTH + 1}}{percent}"
