"""`prothpc bench`: measurements that users can repeat."""

from pathlib import Path
from typing import Annotated

import typer

from hpc.commands import example

app = typer.Typer()
group = typer.Typer(no_args_is_help=True)
app.add_typer(
    group,
    name="bench",
    help="Measure stages on this machine, beside what others use for the same.",
    epilog=example("prothpc bench records --size 200MB --only write,read"),
)


@group.callback()
def _group() -> None:
    """Typer makes a group of one command only with a callback."""


@group.command(
    epilog=example(
        "prothpc bench records --size 200MB --only write,read",
        "prothpc bench records --peers --output records.json --report records.md",
    )
)
def records(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSON of all samples; more are added to it.")
    ] = Path("bench-records.json"),
    report: Annotated[Path | None, typer.Option(help="Markdown to write tables into.")] = None,
    only: Annotated[
        str,
        typer.Option(
            help="Parts: write,read,compression,gzip,linearity,memory,peers; any of them."
        ),
    ] = "write,read,compression,gzip,linearity,memory,peers",
    size: Annotated[str, typer.Option(help="Bytes of synthetic FASTA.")] = "1GB",
    rounds: Annotated[int, typer.Option(help="Times that everything is measured.")] = 5,
    work: Annotated[
        Path | None, typer.Option(help="Directory on a disk for inputs; it is kept.")
    ] = None,
    tmpfs: Annotated[Path, typer.Option(help="Directory in memory.")] = Path("/dev/shm"),
    peers: Annotated[
        bool, typer.Option(help="Install other formats' libraries for the occasion, with pip.")
    ] = False,
) -> None:
    """Measure how fast records are made and read, beside other formats.

    Every measurement is a process of its own; cases take turns, tables give medians. Without
    --peers only formats whose libraries are installed are measured. Needs about six times --size
    in memory and twice that on the disk, where linearity and memory want 15 GB.
    """
    from hpc.bench.records import BenchOptions, bench
    from preprocessing.sizes import parse_size

    bench(
        BenchOptions(
            output=output,
            report=report,
            only=tuple(filter(None, only.split(","))),
            size=parse_size(size),
            rounds=rounds,
            work=work,
            tmpfs=tmpfs,
            peers=peers,
        )
    )
