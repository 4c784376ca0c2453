"""A request into a script: complete, commented, and with every value quoted."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2

from jobs.quoting import Text, command, directive, expandable, only_text, plain, word, words
from jobs.request import Request
from jobs.times import MINUTE, in_lsf, in_slurm
from preprocessing.errors import InputError

JOB_SCRIPT, MERGE_SCRIPT = "job.sh", "merge.sh"

_IMAGE = ".sif"
_LEAST_PATIENCE, _RANKS_PER_SECOND = 60, 10
"""Of the doctor, whose default is a minute; starting thousands of ranks takes longer."""

_NODE_DISK = "/tmp/$USER"
"""Directory in a node whose site names no burst buffer."""


def render(request: Request, job_dir: Path, script: str = JOB_SCRIPT) -> str:
    """Return the script of a request.

    Args:
        request: what is asked for.
        job_dir: directory of the script, its logs and notes; absolute.
        script: its name there.

    Raises:
        InputError: a value that cannot stand in a script, naming it.
    """
    template = _templates().get_template(f"{request.profile.site.scheduler}.sh.j2")
    return template.render(
        {
            **_numbers(request),
            **_stage(request, job_dir, script),
            **_directives(request, job_dir),
            **_software(request),
            **_launch(request),
        }
    )


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("jobs", "templates"),
        undefined=jinja2.StrictUndefined,
        finalize=only_text,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _numbers(request: Request) -> Mapping[str, int]:
    return {
        **request.placeholders,
        "seconds": request.seconds or 0,
        "lead": request.lead,
        "lead_minutes": request.lead // MINUTE,
        "chain": request.chain,
        "tasks": request.tasks,
        "tasks_at_once": request.tasks_at_once,
    }


def _stage(request: Request, job_dir: Path, script: str) -> Mapping[str, Any]:
    stage = request.stage
    folder, names = stage.progress or ["", ""]
    task = [
        expandable(text.replace("{tasks}", str(request.tasks)).replace("{task}", "$task"), "array")
        for text in stage.array
    ]
    return {
        "version": plain(metadata.version("prothpc"), "version"),
        "stage": plain(stage.name, "stage"),
        "site": plain(request.profile.name, "--site"),
        "working_directory": word(request.working_directory, "the working directory"),
        "job_dir": word(job_dir, "the directory of the job"),
        "script": plain(script, "script"),
        "command": words([*stage.program, stage.name, *request.arguments]),
        "array": Text(" ".join(task)) if request.tasks else "",
        "restarts": stage.restarts,
        "on_warning": stage.on_warning,
        "progress_directory": word(
            request.working_directory / request.directory / folder, "the directory of the stage"
        ),
        "progress_names": word(names),
    }


def _directives(request: Request, job_dir: Path) -> Mapping[str, Any]:
    site = request.profile.site
    lines = [*site.submit.directives, *getattr(site.submit, request.stage.work)]
    if request.records is not None or (request.environment is not None and site.burst_buffer.path):
        lines += site.burst_buffer.directives
    if request.racks:
        lines = [*site.racks.directives, *lines]
    seconds = request.seconds or 0
    log_directory = job_dir if site.scheduler != "local" else Path("unused")
    return {
        "project": request.project and plain(request.project, "--project"),
        "queue": request.queue_name and plain(request.queue_name, "--queue"),
        "queue_option": plain(site.submit.queue_option.lstrip("-"), "submit.queue_option"),
        "slurm_time": Text(in_slurm(seconds)),
        "lsf_time": Text(in_lsf(seconds)),
        "log_directory": plain(log_directory, "the directory of the job"),
        "signal": plain(site.stop.signal, "stop.signal"),
        "directives": [directive(request.filled(line), "directive") for line in lines],
        "whole_racks": request.racks and site.racks.replaces_nodes,
        "allocation": site.submit.allocation,
        "stdin": site.submit.stdin,
    }


def _software(request: Request) -> Mapping[str, Any]:
    site, environment = request.profile.site, request.environment
    absolute = request.working_directory / environment if environment is not None else None
    image = absolute is not None and absolute.suffix == _IMAGE
    folder = absolute is not None and absolute.is_dir()
    archive = absolute is not None and not image and not folder
    unpacks = image or archive or request.records is not None
    programs = absolute / "bin" if folder and absolute else Path(sys.executable).parent
    disk = site.burst_buffer.path or _NODE_DISK
    if unpacks and site.scheduler == "local":
        raise InputError("--environment with an archive or image, and --burst-buffer, need nodes")
    local = expandable(f"{disk}/prothpc-$job_id", "burst_buffer.path")
    return {
        "modules": words(site.modules, "modules") if site.modules else "",
        "variables": [
            (Text(name), expandable(value, f"environment.{name}"))
            for name, value in site.environment.items()
        ],
        "local_directory": local if unpacks else "",
        "burst_buffer": bool(site.burst_buffer.path),
        "image": word(absolute, "--environment") if image else "",
        "archive": word(absolute, "--environment") if archive else "",
        "programs": word(programs, "--environment"),
        "records": request.records and word(request.records, "data.records"),
    }


def _launch(request: Request) -> Mapping[str, Any]:
    site = request.profile.site
    lines = {
        "launch": site.engine_line(request.launch),
        "each_node": site.launch.each_node,
        "broadcast": site.launch.broadcast,
        "container": site.launch.container,
    }
    requires = list(request.stage.requires)
    if request.launch in ("deepspeed", "horovod"):
        requires.append(request.launch)
    in_image = request.environment is not None and request.environment.suffix == _IMAGE
    return {
        **{name: command(request.filled(line), f"launch.{name}") for name, line in lines.items()},
        "preflight": request.preflight and request.stage.name != "doctor",
        "requires": Text(f" --require {','.join(requires)}" if requires else ""),
        "patience": _LEAST_PATIENCE + request.ranks // _RANKS_PER_SECOND,
        "runtime": Text('"${runtime[@]}" ' if in_image else ""),
    }
