"""`prothpc submit`, `jobs`, `sites` and `stage`: stages as jobs of Slurm, LSF or this machine."""

import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpc.commands import corpus, example, training
from preprocessing.errors import InputError

if TYPE_CHECKING:
    from jobs.request import Request
    from jobs.site import Profile
    from jobs.stages import Stage

app = typer.Typer()


@app.command(
    # What submit does not know belongs to the stage.
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog=example(
        "prothpc submit preprocess DB.fasta.gz --output records --site generic-slurm --nodes 2 "
        "--time 00:10:00",
        "prothpc submit train my.toml train.run_dir=runs/a --site frontier --nodes 16 "
        "--time 02:00:00 --project ABC123 --chain 5",
        "prothpc submit train my.toml --site summit --nodes 936 --whole-racks --time 1-00:00:00 "
        "--project ABC123 --dry-run",
    ),
)
def submit(
    context: typer.Context,
    stage_name: Annotated[
        str, typer.Argument(metavar="STAGE", help="preprocess, verify, train or doctor.")
    ],
    site: Annotated[str, typer.Option(help="Name or path of a profile; see prothpc sites.")],
    nodes: Annotated[int, typer.Option(help="Compute nodes.")] = 1,
    wall_time: Annotated[
        str | None, typer.Option("--time", help="Wall time, [D-]HH:MM:SS.")
    ] = None,
    project: Annotated[str, typer.Option(help="Whom the time is charged to.")] = "",
    queue: Annotated[str, typer.Option(help="Queue, partition or QOS [default: the site's].")] = "",
    ranks_per_node: Annotated[
        int, typer.Option(help="Ranks of a node [default: one a GPU; MPI stages: one a core].")
    ] = 0,
    whole_racks: Annotated[bool, typer.Option(help="Ask for whole racks.")] = False,
    chain: Annotated[int, typer.Option(help="Jobs, at most, each going on where one ended.")] = 1,
    array: Annotated[
        str | None, typer.Option(help="Tasks of a job array, as 10, or 10%4 for 4 at a time.")
    ] = None,
    after: Annotated[
        str | None, typer.Option(help="Number of a job that has to succeed first.")
    ] = None,
    environment: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="With prothpc in it: a directory, a tar archive or a .sif image [default: the "
            "environment of this command].",
        ),
    ] = None,
    burst_buffer: Annotated[
        bool, typer.Option(help="Copy each node's shards to its own disk first (train).")
    ] = False,
    preflight: Annotated[bool, typer.Option(help="Begin with prothpc doctor.")] = True,
    dry_run: Annotated[bool, typer.Option(help="Print the script; submit nothing.")] = False,
) -> None:
    """Run a stage as a job: write its batch script, let the scheduler check it, submit it.

    All else on the line are the stage's own arguments. --dry-run prints exactly what would be
    submitted; the script may be kept, edited and submitted by hand.
    """
    from jobs.request import parse_array, parse_job_id
    from jobs.site import load_profile
    from jobs.submit import prepare
    from jobs.submit import submit as send
    from jobs.times import parse_time

    arguments = tuple(context.args)
    chosen, profile = _stage(stage_name), load_profile(site)
    if chosen.name == "doctor":
        arguments = (*arguments, "--site", site)  # is its own option, too
    facts = _facts(chosen, arguments, burst_buffer)
    tasks, tasks_at_once = parse_array(array) if array is not None else (0, 0)
    request = _request(
        chosen,
        profile,
        **facts,
        arguments=arguments,
        nodes=nodes,
        seconds=parse_time(wall_time) if wall_time is not None else None,
        project=project,
        queue=queue,
        ranks_per_node=ranks_per_node,
        racks=whole_racks,
        chain=chain,
        tasks=tasks,
        tasks_at_once=tasks_at_once,
        after=parse_job_id(after) if after is not None else "",
        environment=environment,
        preflight=preflight,
    )
    prepared = prepare(request)
    if dry_run:
        for script, command in zip(prepared.scripts, prepared.commands(request), strict=True):
            print(script.text, end="")
            print(f"would be {script.path}, submitted with: {command}", file=sys.stderr)
        return
    ids = send(request, prepared)
    print(_submitted(request, prepared.directory, ids))


def _submitted(request: "Request", directory: Path, ids: list[str]) -> str:
    job, *merging = ids
    site = request.profile.name
    lines = [f"job {job}: prothpc {request.stage.name} on {site}, {_size(request)}"]
    lines += [f"job {number}: puts the {request.tasks} parts together" for number in merging]
    log = "job.log" if request.profile.site.scheduler == "local" else f"{job}*.log"
    lines.append(f"its script, log ({log}) and notes: {directory}")
    lines.append(f"how it is: prothpc jobs {request.directory}")
    return "\n".join(lines)


def _size(request: "Request") -> str:
    nodes = f"{request.nodes} node{'s' if request.nodes > 1 else ''}"
    text = f"{nodes} with {request.ranks_on_node} ranks each"
    if not (request.profile.site.node.cores or request.ranks_per_node):
        text += (
            " (the profile does not say how many cores or GPUs a node has: --ranks-per-node, or a "
            "profile of your own)"
        )
    return text


def _request(stage: "Stage", profile: "Profile", **keywords: Any) -> "Request":
    from jobs.request import Request

    return Request(stage=stage, profile=profile, working_directory=Path.cwd(), **keywords)


def _stage(name: str) -> "Stage":
    from jobs.stages import stages

    if name not in stages():
        raise InputError(f"{name!r} is no stage that can be a job: {', '.join(stages())} are")
    return stages()[name]


def _facts(stage: "Stage", arguments: tuple[str, ...], burst_buffer: bool) -> dict[str, Any]:
    """Let the stage itself read its arguments, now rather than in the job; say what follows."""
    from jobs.quoting import check_typed

    for argument in arguments:
        check_typed(argument, "argument")
    commands = {
        name: command
        for group in (corpus.app, training.app)
        for name, command in typer.main.get_group(group).commands.items()
    }
    with commands[stage.name].make_context(stage.name, list(arguments)) as parsed:
        values = dict(parsed.params)
    if burst_buffer and stage.name != "train":
        raise InputError(f"--burst-buffer is for train: {stage.name} reads no shards again")
    if stage.name != "train":
        return {"directory": Path(values[stage.directory])}
    from hpc.config import load_recipe

    recipe = load_recipe(values["recipe"], values["overrides"] or [])
    return {
        "directory": Path(recipe.train.run_dir),
        "engine": recipe.train.engine,
        "streams": recipe.train.streams,
        "steps": recipe.train.steps,
        "records": Path(recipe.data.records).absolute() if burst_buffer else None,
    }


@app.command(epilog=example("prothpc sites", "prothpc sites frontier", "prothpc sites my.toml"))
def sites(
    name: Annotated[str | None, typer.Argument(help="Profile to explain, by name or path.")] = None,
) -> None:
    """List the site profiles, or explain one: every fact, and where it comes from."""
    from jobs import site as profiles

    if name is not None:
        profile = profiles.load_profile(name)
        print(f"{profile.name}: {profile.site.title}")
        for file in profile.files:
            print(f"  {'from' if file == profile.files[0] else 'inherits from'} {file}")
        for fact, value, source in profile.facts():
            print(f"{fact} = {value}\n    {source}")
        return
    own = profiles.own()
    width = max(map(len, [*own, *profiles.built_in()]))
    for listed in [*own, *(n for n in profiles.built_in() if n not in own)]:
        mine = "  (yours)" if listed in own else ""
        print(f"{listed:{width}}  {profiles.load_profile(listed).site.title}{mine}")
    print(f"\nyour own: NAME.toml in {profiles.own_directory()}, or --site PATH")


@app.command(epilog=example("prothpc jobs runs/a", "prothpc jobs cancel runs/a"))
def jobs(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[cancel] DIRECTORY",
            help="What the jobs make: a run or a record set; cancel: end the newest ones.",
        ),
    ],
    everything: Annotated[
        bool, typer.Option("--all", help="Every submission, not only the newest.")
    ] = False,
) -> None:
    """Say how the jobs of a run are: state, restarts, progress, estimated end, end of the log."""
    from jobs.status import cancel, describe, submissions

    cancelling = len(words) == 2 and words[0] == "cancel"
    if len(words) != 1 and not cancelling:
        raise InputError(
            "give one directory: prothpc jobs DIRECTORY, or prothpc jobs cancel DIRECTORY"
        )
    found = submissions(Path(words[-1]))
    for submitted in found if everything else found[-1:]:
        if cancelling:
            ended = cancel(submitted)
            print(
                f"{submitted.directory.name}: "
                + (f"cancelled {', '.join(ended)}" if ended else "nothing waits or runs")
            )
        else:
            states = submitted.states()
            print(describe(submitted, states, _progress(submitted.note)))


def _progress(note: Mapping[str, Any]) -> list[str]:
    """How far a training is, from its metrics."""
    from hpc.metrics import METRICS, read_metrics

    directory = Path(note["directory"])
    if note["stage"] != "train" or not (directory / METRICS).is_file():
        return []
    lines = [line for line in read_metrics(directory) if "train/loss" in line]
    if not lines:
        return []
    last, steps = lines[-1], int(note["steps"])
    text = f"step {last['step']:,} of {steps:,}, loss {last['train/loss']:.4f}"
    left = estimate_seconds(lines, steps)
    if left is None:
        return [text]
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(last["time"] + left))
    return [f"{text}; {left / 3600:.1f} hours of computing left, at the earliest {end}"]


def estimate_seconds(lines: Sequence[Mapping[str, float]], steps: int) -> float | None:
    """Return the seconds that the steps left will take, at the pace of the newest ones.

    Args:
        lines: of metrics.jsonl, in order of steps.
        steps: of the whole run.

    Returns:
        The median pace of up to 50 intervals, so that waits between attempts do not count; None
        where there is no interval yet, or nothing left.
    """
    paces = [
        (after["time"] - before["time"]) / (after["step"] - before["step"])
        for before, after in itertools.pairwise(lines[-51:])
        if after["step"] > before["step"]
    ]
    left = steps - int(lines[-1]["step"])
    return statistics.median(paces) * left if paces and left > 0 else None


@app.command(epilog=example("srun --ntasks-per-node=1 prothpc stage records /mnt/bb/$USER/records"))
def stage(
    records: Annotated[Path, typer.Argument(help="Directory of a record set.")],
    target: Annotated[Path, typer.Argument(help="Directory on the node's own disk.")],
) -> None:
    """Copy the shards that this node reads to its own disk; started once on each node.

    The others become links, so that what is there is a whole record set. Job scripts with
    --burst-buffer call this; a restart copies only what is missing.
    """
    from hpc.world import world_from_environment
    from jobs.staging import stage as copy

    world = world_from_environment()
    done = copy(records.absolute(), target, world.rank, world.size)
    print(
        f"node {world.rank} of {world.size}: {done.shards:,} shards, {done.bytes / 1e9:.3f} GB, in "
        f"{target}; {done.others:,} stay where they are"
    )
