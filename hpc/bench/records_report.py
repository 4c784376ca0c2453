"""Tables and pictures of what `prothpc bench records` measured."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hpc.bench.measuring import median, read_results

BEGIN, END = "<!-- tables: prothpc bench records --report -->", "<!-- end of tables -->"

Samples = dict[str, list[dict[str, Any]]]
"""Of one part: case → samples, in the order in which cases were measured first."""


def write_report(results: Path, report: Path) -> None:
    """Write the tables into a Markdown file, in place of those that are in it.

    Args:
        results: JSON of `prothpc bench records`.
        report: file to write; text around the tables stays. Pictures go beside it.

    Raises:
        InputError: if `results` is no such file.
    """
    content = read_results(results)
    tables = "\n".join([BEGIN, "", *_all_tables(content, report), END])
    if report.exists() and BEGIN in (text := report.read_text()) and END in text:
        before, _, rest = text.partition(BEGIN)
        report.write_text(before + tables + rest.partition(END)[2])
    else:
        report.write_text(f"# Making and reading records, measured\n\n{tables}\n")


def _all_tables(content: dict[str, Any], report: Path) -> Iterator[str]:
    yield from _about(content)
    parts: dict[str, Samples] = {}
    for sample in content["samples"]:
        parts.setdefault(sample["part"], {}).setdefault(sample["case"], []).append(sample)
    for name, table in _TABLES.items():
        if name in parts:
            yield from table(parts[name])
            yield ""
    if "linearity" in parts:
        picture = report.with_suffix(".linearity.png")
        _plot_linearity(parts["linearity"], picture)
        yield f"![Time against size of the input]({picture.name})"
        yield ""


def _about(content: dict[str, Any]) -> Iterator[str]:
    machine, versions = content["machine"], content.get("versions", {})
    yield (
        f"Machine: {machine['cores']} cores of {machine['processor']}, "
        f"{machine['memory_gib']:.0f} GiB, {machine['system']}; Python {machine['python']}, "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + f". Commit {_commits(content)}. FASTA: {content['size'] / 1e6:,.0f} MB where no other "
        "size is given, synthetic, 60-column lines. Medians; least and greatest in brackets."
    )
    yield ""
    yield "```"
    yield from content["commands"]
    yield "```"
    yield ""


def _commits(content: dict[str, Any]) -> str:
    parts: dict[str, list[str]] = {}
    for sample in content["samples"]:
        names = parts.setdefault(sample["commit"], [])
        if sample["part"] not in names:
            names.append(sample["part"])
    if len(parts) == 1:
        return next(iter(parts))
    return ", ".join(f"{commit} ({', '.join(names)})" for commit, names in parts.items())


def _write_table(samples: Samples) -> Iterator[str]:
    yield from _head("whole job: where, ranks", "MB/s of FASTA", "seconds", "CPU s", "× one rank")
    for case, of_case in samples.items():
        where, _, ranks = case.partition(", ")
        alone = median(samples.get(f"{where}, 1", []))
        gain = f"{alone / _median(of_case):.2f}" if alone and ranks != "1" else ""
        yield _row(case, _rate(of_case), _seconds(of_case), _cpu(of_case), gain)


def _compression_table(samples: Samples) -> Iterator[str]:
    yield from _head(
        "shards", "MB/s of FASTA", "seconds", "bytes a byte of FASTA", "read, records/s"
    )
    for case, of_case in samples.items():
        if "written" in of_case[0]:
            written = f"{of_case[0]['written'] / of_case[0]['bytes']:.3f}"
            read = samples.get(f"packed reader, {case}")
            rate = _records_rate(read) if read else ""
            yield _row(case, _rate(of_case), _seconds(of_case), written, rate)
    if "bits" in samples:
        about = samples["bits"][0]
        yield ""
        yield (
            f"Residues alone, compressed by batches with zstd: "
            f"{8 * about['compressed'] / about['residues']:.2f} bits each."
        )


def _gzip_table(samples: Samples) -> Iterator[str]:
    yield from _head("input", "seconds", "MB/s of text", "whole ÷ (plain + decompression)")
    plain = median(samples.get("plain", []))
    for case, of_case in samples.items():
        alone = median(samples.get(f"{case}, decompression alone", []))
        ratio = f"{_median(of_case) / (plain + alone):.2f}" if plain and alone else ""
        yield _row(case, _seconds(of_case), _rate(of_case), ratio)


def _linearity_table(samples: Samples) -> Iterator[str]:
    yield from _head("FASTA", "seconds", "MB/s", "CPU s a GB")
    for case, of_case in samples.items():
        cpu = f"{_median(of_case, 'cpu_seconds') / of_case[0]['bytes'] * 1e9:.2f}"
        yield _row(case, _seconds(of_case), _rate(of_case), cpu)


def _memory_table(samples: Samples) -> Iterator[str]:
    yield from _head("FASTA", "peak anonymous memory, MiB", "greatest of all rounds")
    for case, of_case in samples.items():
        greatest = max(sample["peak_anonymous"] for sample in of_case)
        middle = f"{_median(of_case, 'peak_anonymous') / 2**20:,.0f}"
        yield _row(case, middle, f"{greatest / 2**20:,.0f}")


def _read_table(samples: Samples) -> Iterator[str]:
    ours = samples.get("packed")
    yield from _head("reader, one process", "records/s", "MB of residues/s", "packed is × as fast")
    for case, of_case in sorted(samples.items(), key=lambda item: -_record_speed(item[1])):
        if not _for_training(case):
            ratio = f"{_record_speed(ours) / _record_speed(of_case):.1f}" if ours else ""
            yield _row(case, _records_rate(of_case), _residues_rate(of_case), ratio)
    yield ""
    yield from _head("micro-batches for training, one process", "records/s", "M tokens/s")
    for case, of_case in samples.items():
        if _for_training(case):
            yield _row(case, _records_rate(of_case), _residues_rate(of_case))


def _peers_table(samples: Samples) -> Iterator[str]:
    yield from _head("writer, one process", "MB/s of FASTA", "seconds", "MB of FASTA")
    for case, of_case in sorted(samples.items(), key=lambda item: -_speed(item[1])):
        yield _row(case, _rate(of_case), _seconds(of_case), f"{of_case[0]['bytes'] / 1e6:,.0f}")


def _for_training(case: str) -> bool:
    return case.startswith(("padded", "masked"))


_TABLES: dict[str, Callable[[Samples], Iterator[str]]] = {
    "write": _write_table,
    "peers": _peers_table,
    "read": _read_table,
    "compression": _compression_table,
    "gzip": _gzip_table,
    "linearity": _linearity_table,
    "memory": _memory_table,
}


def _plot_linearity(samples: Samples, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    points = [
        (sample["bytes"] / 1e9, sample["seconds"])
        for of_case in samples.values()
        for sample in of_case
    ]
    medians = [(part[0]["bytes"] / 1e9, _median(part)) for part in samples.values()]
    axes.plot(*zip(*points, strict=True), "o", color="0.6", markersize=4, label="each run")
    axes.plot(*zip(*sorted(medians), strict=True), "o-", label="median")
    largest, seconds = max(medians)
    axes.plot([0, largest], [0, seconds], ":", color="0.3", label="proportional to the largest")
    axes.set_xlabel("FASTA, GB")
    axes.set_ylabel("seconds, whole job on one rank")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def _head(*titles: str) -> Iterator[str]:
    yield _row(*titles)
    yield "|---" * len(titles) + "|"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _median(samples: list[dict[str, Any]], what: str = "seconds") -> float:
    value = median(samples, what)
    assert value is not None
    return value


def _spread(values: list[float], digits: int) -> str:
    return f" ({min(values):,.{digits}f} to {max(values):,.{digits}f})" if len(values) > 1 else ""


def _seconds(samples: list[dict[str, Any]]) -> str:
    seconds = [sample["seconds"] for sample in samples]
    return f"{_median(samples):,.2f}{_spread(seconds, 2)}"


def _cpu(samples: list[dict[str, Any]]) -> str:
    return f"{_median(samples, 'cpu_seconds'):,.2f}"


def _speed(samples: list[dict[str, Any]]) -> float:
    return samples[0]["bytes"] / 1e6 / _median(samples)


def _rate(samples: list[dict[str, Any]]) -> str:
    return f"{_speed(samples):,.0f}"


def _rates(samples: list[dict[str, Any]], what: str) -> list[float]:
    return [sample[what] / sample["seconds"] for sample in samples]


def _record_speed(samples: list[dict[str, Any]]) -> float:
    values = sorted(_rates(samples, "records"))
    return values[len(values) // 2]


def _records_rate(samples: list[dict[str, Any]]) -> str:
    return f"{_record_speed(samples):,.0f}{_spread(_rates(samples, 'records'), 0)}"


def _residues_rate(samples: list[dict[str, Any]]) -> str:
    values = sorted(_rates(samples, "residues"))
    return f"{values[len(values) // 2] / 1e6:,.0f}"
