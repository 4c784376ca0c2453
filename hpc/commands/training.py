"""`prothpc train`, `export` and `doctor`: from records to a model."""

import atexit
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from hpc.commands import example
from preprocessing.errors import InputError

app = typer.Typer()


@app.command(
    epilog=example(
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
    stop_after: Annotated[
        str | None, typer.Option(help="Save and end after this time, [D-]HH:MM:SS.")
    ] = None,
    stop_signal: Annotated[
        str, typer.Option(help="Signal on which to save and end: USR2 or USR1; TERM always does.")
    ] = "USR2",
) -> None:
    """Train a model as a recipe says; the same command again goes on where it ended."""
    from hpc.stopping import StopSignals
    from jobs.times import parse_time

    seconds = parse_time(stop_after, "--stop-after") if stop_after is not None else None
    signals = StopSignals(warning=stop_signal, seconds=seconds)  # before anything that takes long

    from hpc.config import load_recipe
    from hpc.train import train as run

    code = run(load_recipe(recipe, overrides or []), resume_from=resume, signals=signals)
    _exit_at_once(code)


def _exit_at_once(code: int) -> NoReturn:
    """End the process with all that atexit asks for, but without taking Python down.

    Threads of torch.distributed may still let go of tensors then, for which they need Python: that
    aborts the process, and its exit code says that the run has failed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@app.command(epilog=example("prothpc export runs/first model --format hf"))
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
    epilog=example(
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
    profile: Annotated[
        str | None, typer.Option("--site", help="Profile to compare the machine with.")
    ] = None,
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
        site=profile,
    )
    sys.exit(examine(options))
