"""`prothpc filter`: sequences too similar to test sets, to training data or to one another."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from hpc.commands import example
from preprocessing.errors import InputError

app = typer.Typer()

Paths = list[Path]


@app.command(
    epilog=example(
        "prothpc filter --queries uniref90.fasta --targets tests.fasta --preset proteinbert "
        "-o too-similar",
        "prothpc filter --queries new.fasta --targets train.fasta --preset prottrans-new364 "
        "--kept -o apart",
        "prothpc filter --queries apart/kept.fasta --self --reduce --preset prottrans-new364 "
        "--kept -o set",
        "srun prothpc filter … --chunks 100 --chunk $SLURM_ARRAY_TASK_ID, then without --chunk",
    )
)
def filter(
    queries: Annotated[
        Paths, typer.Option(help="FASTA or record set that is searched with. May be repeated.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the result.")],
    targets: Annotated[
        Paths | None, typer.Option(help="FASTA or record set searched. May be repeated.")
    ] = None,
    within: Annotated[
        bool, typer.Option("--self", help="Search the queries against themselves.")
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(help="proteinbert or prottrans-new364; what else is typed goes first."),
    ] = None,
    tool: Annotated[str | None, typer.Option(help="blastp or mmseqs2.")] = None,
    min_identity: Annotated[
        float | None, typer.Option(help="A hit is identical in at least this fraction.")
    ] = None,
    identity_above: Annotated[
        float | None, typer.Option(help="Or: in more than this fraction.")
    ] = None,
    identity_of: Annotated[
        str | None,
        typer.Option(help="Fraction of the alignment, of the query or of the shorter sequence."),
    ] = None,
    min_coverage: Annotated[
        float | None, typer.Option(help="Fraction of the shorter sequence that is aligned.")
    ] = None,
    max_evalue: Annotated[
        float | None, typer.Option(help="Greatest e-value of a hit (0.001).")
    ] = None,
    exclude: Annotated[
        str | None, typer.Option(help="Which side is excluded: queries or targets.")
    ] = None,
    reduce: Annotated[
        bool, typer.Option(help="With --self: keep one of several similar sequences.")
    ] = False,
    prefer: Annotated[
        str | None, typer.Option(help="The one to keep: the longest, or the first in the input.")
    ] = None,
    kept: Annotated[bool, typer.Option(help="Also write what stays, as kept.fasta.")] = False,
    sensitivity: Annotated[float | None, typer.Option(help="Of MMseqs2, 1 to 7.5 (5.7).")] = None,
    split: Annotated[
        int | None, typer.Option(help="MMseqs2 searches the targets in so many parts.")
    ] = None,
    max_hits: Annotated[
        int | None, typer.Option(help="Most hits of a query to ask for (all).")
    ] = None,
    on_invalid: Annotated[
        str, typer.Option(help="As for preprocess: error, mask or drop.")
    ] = "error",
    chunks: Annotated[
        int | None, typer.Option(help="Parts of the queries (one per 5 million residues).")
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Search only this one, 0 to N - 1: for job arrays.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of a program (the cores for this rank).")
    ] = None,
    program: Annotated[
        Path | None, typer.Option(help="Path of blastp or mmseqs (on PATH).")
    ] = None,
) -> None:
    """Find sequences too similar to others, with BLASTP or MMseqs2; restartable, chunk by chunk.

    What it writes, exclusions.parquet, goes to preprocess --exclude. Finished chunks survive a
    kill: run the same command again.
    """
    from hpc.launch import world_from_environment
    from preprocessing.filtering.options import PRESETS, resolve_options
    from preprocessing.filtering.stage import Execution, filter_sequences
    from preprocessing.parallel import connect

    if within == bool(targets):
        raise InputError("say what is searched: give either --targets or --self")
    options = resolve_options(
        preset,
        tool=tool,
        min_identity=min_identity,
        identity_above=identity_above,
        identity_of=identity_of,
        min_coverage=min_coverage,
        max_evalue=max_evalue,
        exclude=exclude,
        reduce=reduce,
        prefer=prefer,
        kept=kept,
        sensitivity=sensitivity,
        split=split,
        max_hits=max_hits,
        on_invalid=on_invalid,
    )
    world = world_from_environment()
    execution = Execution(
        chunks=chunks,
        chunk=chunk,
        threads=threads or max(1, len(os.sched_getaffinity(0)) // world.local_size),
        program=program,
    )
    ranks = connect(world.size)
    summary = filter_sequences(queries, targets, output, options, execution, ranks)
    if ranks.rank == 0 and summary is not None:
        print(_describe(output, summary))
        if preset:
            print(f"{preset}: {PRESETS[preset].on_hit} what preprocess --exclude finds")


def _describe(output: Path, summary: dict[str, Any]) -> str:
    excluded = summary["excluded"]
    lines = [
        f"{output}: {excluded['records']:,} of {excluded['of']:,} {excluded['side']} excluded "
        f"({summary['threshold']}; {summary['tool']['name']} {summary['tool']['version']})"
    ]
    if excluded["only_equal"]:
        lines.append(
            f"{excluded['only_equal']:,} of them equal another sequence that the program did not "
            "align with them: they are short or masked"
        )
    if summary["queries_cut_short"]:
        lines.append(
            f"{summary['queries_cut_short']:,} queries have more hits than --max-hits: others may "
            "be missing"
        )
    return "\n".join(lines)
