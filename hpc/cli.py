"""The command `prothpc`: one sub-command per stage. Heavy imports wait until a stage runs."""

import errno
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from preprocessing.errors import InputError, OtherRankError

RANK_DELAY_SECONDS = 2.0
"""Other ranks wait this long before they report an error that rank 0 may report for all."""

app = typer.Typer(
    name="prothpc",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Pre-train protein language models on supercomputers: FASTA in, trained models out.

Every stage runs alone on a laptop, and unchanged under mpirun, srun, jsrun or torchrun.

[bold]The usual way[/bold]

  prothpc preprocess uniref50.fasta.gz --output records --holdout 0.005
  prothpc verify records
  prothpc train protbert-tiny data.records=records train.run_dir=runs/first
  prothpc export runs/first model --format hf

No FASTA at hand? prothpc synthesize makes one. Every command explains itself with --help.""",
)


def _example(*lines: str) -> str:
    return "[bold]Example[/bold]\n\n" + "\n\n".join(f"  {line}" for line in lines)


@app.command(
    epilog=_example(
        "prothpc synthesize corpus.fasta --size 100MB --seed 1",
        "prothpc synthesize corpus.fasta.gz --records 5000 --families 20 --truth families.tsv",
    )
)
def synthesize(
    output: Annotated[Path, typer.Argument(help="FASTA to write; .gz compresses it.")],
    size: Annotated[str | None, typer.Option(help="Bytes of FASTA, e.g. 100MB or 1GiB.")] = None,
    records: Annotated[int | None, typer.Option(help="Or: exact number of proteins.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed and options, same bytes.")] = 0,
    families: Annotated[int | None, typer.Option(help="Protein families.")] = None,
    median_length: Annotated[int, typer.Option(help="Median number of residues.")] = 250,
    min_identity: Annotated[float, typer.Option(help="Least identity to the ancestor.")] = 0.5,
    max_identity: Annotated[float, typer.Option(help="Greatest identity to the ancestor.")] = 0.95,
    hidden_families: Annotated[int, typer.Option(help="Families for the hidden set.")] = 0,
    hidden_output: Annotated[Path | None, typer.Option(help="FASTA of the hidden set.")] = None,
    truth: Annotated[Path | None, typer.Option(help="TSV of each protein's family.")] = None,
    go_terms: Annotated[Path | None, typer.Option(help="TSV of each protein's GO terms.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace existing files.")] = False,
) -> None:
    """Write a UniRef-like FASTA of protein families, to try things out or to measure them."""
    from preprocessing.sizes import parse_size
    from preprocessing.synthetic import SynthesisOptions
    from preprocessing.synthetic import synthesize as make

    if (size is None) == (records is None):
        raise InputError("say how much to make: give either --size or --records")
    options = SynthesisOptions(
        size_bytes=None if size is None else parse_size(size),
        records=records,
        seed=seed,
        families=families,
        median_length=median_length,
        min_identity=min_identity,
        max_identity=max_identity,
        hidden_families=hidden_families,
    )
    made = make(
        output,
        options,
        hidden_output=hidden_output,
        truth=truth,
        go_terms=go_terms,
        overwrite=overwrite,
    )
    print(
        f"{output}: {made.records:,} proteins of {made.families:,} families, "
        f"{made.residues:,} residues, {made.bytes:,} bytes of FASTA"
    )


@app.command(
    epilog=_example(
        "prothpc preprocess uniref50.fasta.gz --output records --holdout 0.005",
        "mpirun -n 8 prothpc preprocess bfd/*.fasta --output records --shards 6000",
    )
)
def preprocess(
    inputs: Annotated[list[Path], typer.Argument(help="FASTA files, plain or gzip.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the record set.")],
    shards: Annotated[
        int | None, typer.Option(help="Shards of the training split [default: by input size].")
    ] = None,
    holdout: Annotated[float, typer.Option(help="Share of sequences held out.")] = 0.0,
    min_length: Annotated[int, typer.Option(help="Drop shorter proteins.")] = 1,
    max_length: Annotated[int | None, typer.Option(help="Drop longer proteins.")] = None,
    on_invalid: Annotated[
        str, typer.Option(help="What a character that is no residue does: error, mask or drop.")
    ] = "error",
    dedup: Annotated[bool, typer.Option(help="Keep one of several equal sequences.")] = True,
    memory: Annotated[str, typer.Option(help="Memory per rank for collected records.")] = "1GiB",
) -> None:
    """Turn FASTA into sharded Arrow records: validated, de-duplicated, shuffled, checksummed.

    The result depends on inputs and options alone: any number of ranks, any order of the files and
    any crash and restart give the same bytes. A restart repeats only what is missing.
    """
    from hpc.launch import world_from_environment
    from preprocessing.generate import PreprocessOptions, generate
    from preprocessing.parallel import connect
    from preprocessing.sizes import parse_size

    options = PreprocessOptions(
        shards=shards,
        holdout=holdout,
        min_length=min_length,
        max_length=max_length,
        on_invalid=on_invalid,  # type: ignore[arg-type]  # it checks the choice
        dedup=dedup,
        memory=parse_size(memory),
    )
    ranks = connect(world_from_environment().size)
    manifest = generate(inputs, output, options, ranks)
    if ranks.rank == 0:
        print(_summary(output, manifest))


def _summary(output: Path, manifest: dict[str, Any]) -> str:
    totals = manifest["totals"]
    rejected = ", ".join(
        f"{count['records']:,} {reason.replace('_', ' ')}"
        for reason, count in totals["not_kept"].items()
        if count["records"]
    )
    splits = ", ".join(
        f"{totals['splits'][split]['records']:,} {split}"
        for split in ("train", "holdout")
        if split in totals["splits"]
    )
    return (
        f"{output}: {totals['kept']['records']:,} records ({splits}) with "
        f"{totals['kept']['residues']:,} residues of {totals['read']['records']:,} read; "
        f"not kept: {rejected or 'none'}"
    )


@app.command(epilog=_example("prothpc verify records", "mpirun -n 8 prothpc verify records"))
def verify(
    directory: Annotated[Path, typer.Argument(help="Directory of a record set.")],
) -> None:
    """Recount and re-hash a record set; name every shard in which something is wrong."""
    from hpc.launch import world_from_environment
    from preprocessing.parallel import connect
    from preprocessing.verify import verify as check

    ranks = connect(world_from_environment().size)
    report = check(directory, ranks)
    if ranks.rank == 0:
        print(
            f"{directory}: in order: {report.shards:,} shards, {report.records:,} records, "
            f"{report.residues:,} residues, {report.bytes:,} bytes"
        )


@app.command(
    epilog=_example(
        "prothpc train protbert-tiny data.records=records train.run_dir=runs/first",
        "mpirun -n 2 prothpc train my.toml optimizer.lr=1e-3",
        "torchrun --nproc-per-node 4 -m hpc.cli train my.toml",
    )
)
def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a built-in recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, any number of them.")
    ] = None,
    resume: Annotated[
        str, typer.Option(help="auto, never, or a checkpoint or run directory to go on from.")
    ] = "auto",
) -> None:
    """Train a model as a recipe says; the same command again goes on where it ended."""
    from hpc.config import load_recipe
    from hpc.train import train as run

    sys.exit(run(load_recipe(recipe, overrides or []), resume_from=resume))


@app.command(epilog=_example("prothpc export runs/first model --format hf"))
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run: its newest one.")],
    directory: Annotated[Path, typer.Argument(help="Directory to make.")],
    format: Annotated[str, typer.Option(help="hf: Hugging Face transformers.")] = "hf",
) -> None:
    """Write a trained model for Hugging Face transformers, with its tokenizer."""
    from hpc.export import export_checkpoint

    if format != "hf":
        raise InputError(f"--format {format} is unknown: the only format is hf")
    print(export_checkpoint(checkpoint, directory))


@app.command(
    epilog=_example(
        "prothpc doctor",
        "mpirun -n 4 prothpc doctor --dir /scratch/me --require mmseqs",
        "srun prothpc doctor --json doctor.json && srun prothpc train my.toml",
    )
)
def doctor(
    dir: Annotated[Path, typer.Option(help="Directory to write to, like a run's.")] = Path(),
    size: Annotated[str, typer.Option(help="Bytes that each node writes there.")] = "64MiB",
    require: Annotated[
        list[str] | None,
        typer.Option(help="What has to work: deepspeed,horovod,mpi,gpu,blastp,mmseqs and more."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for all that was measured.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a check has hung.")] = 60.0,
) -> None:
    """Check what a run needs: ranks, network, devices, engines, MPI, disk, search programs.

    Prints a line per check, green, yellow or red, with what to do; the exit code is 1 if any is
    red. Alone it looks at this machine, under a launcher at all nodes of the job.
    """
    from hpc.doctor import DoctorOptions, parse_requirements
    from hpc.doctor import doctor as examine
    from preprocessing.sizes import parse_size

    options = DoctorOptions(
        directory=dir,
        size=parse_size(size),
        require=parse_requirements(require or []),
        json_file=json,
        timeout=timeout,
    )
    sys.exit(examine(options))


def main() -> None:
    """Run the command line; wrong input ends in one sentence, a bug in its traceback."""
    logging.basicConfig(format="%(message)s")
    for package in ("hpc", "models", "preprocessing"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        app()
    except Exception as error:
        _fail(error)


def _fail(error: Exception) -> None:
    """Report an error once, not once a rank, and end this rank whatever the others do."""
    from hpc.launch import world_from_environment

    try:
        world = world_from_environment()
        rank, size = world.rank, world.size
    except InputError:
        rank, size = 0, 1
    # Most errors concern all ranks. Where rank 0 reports one, the launcher ends the others while
    # they wait here; where another rank alone has it, it is reported late, but not lost.
    if rank or isinstance(error, OtherRankError):
        time.sleep(RANK_DELAY_SECONDS)
    if isinstance(error, OtherRankError):
        time.sleep(RANK_DELAY_SECONDS)
    where = f"rank {rank}: " if rank else ""
    if isinstance(error, InputError) or _is_refusal_of_the_system(error):
        print(f"prothpc: {where}{error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
    if size > 1:
        # Tearing down MPI or torch.distributed would wait for ranks that may wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    sys.exit(1)


def _is_refusal_of_the_system(error: Exception) -> bool:
    """Whether the file system said no: its message names the file and the reason."""
    return isinstance(error, OSError) and (
        error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)
    )


if __name__ == "__main__":
    main()
