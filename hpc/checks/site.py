"""Check of a site profile: does the machine have what the profile says of it?"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpc.checks.findings import Check, Finding, Measured, Situation, group, where
from hpc.checks.programs import ask
from jobs.site import Site, load_profile

_PROGRAMS = {
    "slurm": ("sbatch", "squeue", "scontrol", "scancel"),
    "lsf": ("bsub", "bjobs", "bkill"),
    "local": (),
}


def _measure(situation: Situation) -> dict[str, Any]:
    if situation.site is None:
        return {"site": None}
    site = load_profile(situation.site).site
    inside = "SLURM_JOB_ID" in os.environ or "LSB_JOBID" in os.environ
    return {
        "site": situation.site,
        "inside": inside,
        "wrong": [
            *_missing_programs(site),
            *_unknown_queue(site, situation.timeout),
            *(_other_node(site) if inside else ()),
        ],
    }


def _missing_programs(site: Site) -> Iterator[str]:
    launch = site.launch
    lines = (launch.mpi, launch.torch, launch.deepspeed, launch.horovod, launch.each_node)
    launchers = {shlex.split(line)[0] for line in lines if line}
    for name in (*_PROGRAMS[site.scheduler], *sorted(launchers)):
        if shutil.which(name) is None:
            yield f"{name} is not on PATH"


def _unknown_queue(site: Site, timeout: float) -> Iterator[str]:
    """Ask Slurm for the partitions; a QOS needs an accounting database, and is not asked for."""
    if site.scheduler != "slurm" or site.submit.queue_option != "--partition":
        return
    for name in dict.fromkeys(filter(None, (site.queue, *site.queues))):
        answer = ask({"it": ["scontrol", "show", "partition", name]}, timeout)["it"]
        if "output" not in answer:
            yield f"Slurm does not know the partition {name} ({answer.get('trouble', 'no answer')})"


def _other_node(site: Site) -> Iterator[str]:
    """Compare with the compute node that this is."""
    cores = os.cpu_count() or 0
    if site.node.cores > cores:
        yield f"node.cores = {site.node.cores}, but this node has {cores}"
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) or len(
        list(Path("/dev/dri").glob("renderD*"))
    )
    if site.node.gpus > gpus:
        yield f"node.gpus = {site.node.gpus}, but this node has {gpus}"
    if site.burst_buffer.path:
        path = os.path.expandvars(site.burst_buffer.path)
        parent = path if os.path.isdir(path) else os.path.dirname(path)
        if not os.access(parent, os.W_OK):
            yield f"burst_buffer.path = {path} cannot be written"


def _judge(measured: Sequence[Measured]) -> Iterator[Finding]:
    measured = [one for one in measured if one.values["site"] is not None]
    for finding, ranks in group(measured, _of_node).items():
        yield replace(finding, text=finding.text + where(ranks, measured))


def _of_node(one: Measured) -> Finding:
    name = one.values["site"]
    if one.values["wrong"]:
        return Finding(
            check="site",
            level="fail",
            text=f"{name}: {'; '.join(one.values['wrong'])}",
            advice="say what is right in a profile of your own (docs/jobs-own-site.md)",
        )
    if not one.values["inside"]:
        return Finding(
            check="site",
            level="note",
            text=f"{name}: programs and queues are here",
            advice=f"prothpc submit doctor --site {name} also looks at the nodes",
        )
    return Finding(check="site", level="ok", text=f"{name}: programs, queues and node agree")


SITE = Check(
    name="site",
    measure=_measure,
    judge=_judge,
    advice="look at the profile: prothpc sites NAME",
    once_per_node=True,
)
"""Worth a line only with --site."""
