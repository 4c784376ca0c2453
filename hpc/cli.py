"""The command `prothpc`: one sub-command per stage."""

import errno
import logging
import os
import sys
import time
import traceback

import typer

from hpc.commands import bench, corpus, filtering, jobs, training
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
for stages in (corpus, filtering, training, jobs, bench):
    app.add_typer(stages.app)


def main() -> None:
    """Run the command line; wrong input ends in one sentence, a bug in its traceback."""
    logging.basicConfig(format="%(message)s")
    for package in ("hpc", "jobs", "models", "preprocessing"):
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
