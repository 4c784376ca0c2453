"""Checks of the machine: GPUs or cores of each rank, memory, limits of the system."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpc.checks.findings import (
    GIB,
    Check,
    Finding,
    Measured,
    Situation,
    group,
    in_bytes,
    nodes,
    places,
    where,
)
from hpc.launch import device_of

_LEAST_MEMORY_PER_RANK = 2 * GIB
"""`prothpc preprocess` collects 1 GiB of records per rank by default, beside its libraries."""

_LEAST_SHARED_MEMORY = 128 * 2**20
"""Ranks of a node exchange data through /dev/shm; Docker's default of 64 MiB is too little."""

_FILES_OF_A_PROCESS = 512
"""Open files of a rank beside its connections: libraries, shards, logs, with room to spare."""


def _measure_devices(situation: Situation) -> dict[str, Any]:
    try:
        import torch
    except Exception:  # the versions tell
        return {}
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            # Older torch knows no UUID; then the number, of those that the rank may see.
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
            identity = str(getattr(properties, "uuid", f"{index} of {visible}"))
            gpus.append(
                {"name": properties.name, "memory": properties.total_memory, "id": identity}
            )
    return {
        "gpus": gpus,
        "gpu": device_of(situation.world).index if gpus else None,
        "driver": Path("/proc/driver/nvidia/version").exists(),
        "torch": torch.__version__,
        "for_gpus": torch.backends.cuda.is_built(),
        "cores": sorted(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "threads_are_set": "OMP_NUM_THREADS" in os.environ,
    }


def _judge_devices(measured: Sequence[Measured]) -> Iterator[Finding]:
    measured = [one for one in measured if one.values]
    if not measured:
        return
    with_gpu = [one for one in measured if one.values["gpus"]]
    without = [one for one in measured if not one.values["gpus"]]
    if with_gpu and without:
        yield Finding(
            check="devices",
            level="fail",
            text=f"no GPU for {places(without)}, but {places(with_gpu)} have one",
            advice="ask for the same GPUs on every node; look at CUDA_VISIBLE_DEVICES there",
            lacks=("gpu",),
        )
    elif with_gpu:
        yield from _judge_gpus(with_gpu)
    else:
        yield _no_gpu(without)
    yield from _judge_cores(measured)


def _judge_gpus(measured: Sequence[Measured]) -> Iterator[Finding]:
    used = group(measured, lambda one: (one.host, _own_gpu(one)["id"]))
    shared = [ranks for ranks in used.values() if len(ranks) > 1]
    if shared:
        yield Finding(
            check="devices",
            level="fail",
            text=f"{len(shared)} GPUs have several ranks each: " + "; ".join(map(places, shared)),
            advice="start as many ranks per node as it has GPUs, and let each see its own or all",
        )
        return
    kinds = group(measured, lambda one: (_own_gpu(one)["name"], _own_gpu(one)["memory"]))
    texts = [
        f"{name}, {in_bytes(memory)}{where(ranks, measured)}"
        for (name, memory), ranks in kinds.items()
    ]
    yield Finding(
        check="devices",
        level="ok" if len(kinds) == 1 else "note",
        text=f"a GPU for each rank: {'; '.join(texts)}",
        advice="" if len(kinds) == 1 else "the slowest kind sets the pace of all",
    )


def _own_gpu(one: Measured) -> dict[str, Any]:
    return one.values["gpus"][one.values["gpu"]]


def _no_gpu(measured: Sequence[Measured]) -> Finding:
    unused = [one for one in measured if one.values["driver"]]
    if unused:
        return Finding(
            check="devices",
            level="note",
            text=f"torch {unused[0].values['torch']} sees no GPU, but NVIDIA's driver is there"
            f"{where(unused, measured)}",
            advice="install a torch built for CUDA; ask the scheduler for GPUs; look at "
            "CUDA_VISIBLE_DEVICES",
            lacks=("gpu",),
        )
    built = measured[0].values["for_gpus"]
    why = "torch sees no GPU" if built else "torch is built without CUDA"
    return Finding(check="devices", level="ok", text=f"CPUs only, {why}", lacks=("gpu",))


def _judge_cores(measured: Sequence[Measured]) -> Iterator[Finding]:
    """Compare the cores of each node with the ranks and threads that compute there."""
    crowded, overcommitted, shares = [], [], set()
    for ranks in group(measured, lambda one: one.host).values():
        cores = set().union(*(one.values["cores"] for one in ranks))
        shares.add((len(cores), len(ranks)))
        if len(cores) < len(ranks):
            crowded += ranks
        # prothpc train shares the cores out by itself where the variable is not set.
        elif any(one.values["threads_are_set"] for one in ranks):
            threads = sum(one.values["threads"] for one in ranks)
            overcommitted += ranks if threads > len(cores) else []
    if crowded:
        yield Finding(
            check="cores",
            level="note",
            text=f"fewer cores than ranks for {places(crowded)}",
            advice="start fewer ranks per node, or see how they are bound: mpirun --bind-to none, "
            "srun --cpu-bind=none or -c CORES",
        )
    elif overcommitted:
        yield Finding(
            check="cores",
            level="note",
            text=f"more threads than cores for {places(overcommitted)}",
            advice="set OMP_NUM_THREADS to cores divided by ranks of a node, or leave it unset",
        )
    else:
        least_cores, most_ranks = min(shares, key=lambda share: share[0] / share[1])
        text = f"{least_cores} for {most_ranks} rank{'s' if most_ranks > 1 else ''}"
        if nodes(measured) > 1:
            text += " on each node" if len(shares) == 1 else " on the fullest node"
        yield Finding(check="cores", level="ok", text=text)


DEVICES = Check(
    name="devices",
    measure=_measure_devices,
    judge=_judge_devices,
    advice="look at the GPU driver with nvidia-smi; CUDA_VISIBLE_DEVICES= tries without",
)


def _measure_memory(situation: Situation) -> dict[str, Any]:
    # Lines like "MemAvailable:  16384 kB", where kB means KiB.
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    known = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
    total, available = known["MemTotal"], known["MemAvailable"]
    limit = _cgroup_limit()
    shared = os.statvfs("/dev/shm")
    return {
        "total": total,
        "available": available if limit is None else min(available, limit),
        "limit": limit if limit is not None and limit < total else None,
        "shared": shared.f_blocks * shared.f_frsize,
        "ranks": situation.world.local_size,
    }


def _cgroup_limit() -> int | None:
    """Find the memory that a scheduler or container grants, in version 1 or 2 of cgroups."""
    limits = []
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup", controllers)
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        group_path = root / place.lstrip("/")
        for folder in (group_path, *group_path.parents):
            # A container sees its own group at the root, whatever its path is called outside.
            with suppress(OSError, ValueError):  # ValueError: the word "max"
                limits.append(int((folder / name).read_text()))
            if folder == root:
                break
    return min(limits, default=None)


def _judge_memory(measured: Sequence[Measured]) -> Iterator[Finding]:
    least = min(measured, key=lambda one: one.values["available"] / one.values["ranks"])
    per_rank = least.values["available"] / least.values["ranks"]
    limit = least.values["limit"]
    text = (
        f"{in_bytes(least.values['available'])} available of "
        f"{in_bytes(limit or least.values['total'])}{' that the job may use' if limit else ''}"
    )
    if least.values["ranks"] > 1:
        text += f", {in_bytes(per_rank)} a rank"
    if nodes(measured) > 1:
        text += f", on the node that has least ({least.host})"
    enough = per_rank >= _LEAST_MEMORY_PER_RANK
    yield Finding(
        check="memory",
        level="ok" if enough else "note",
        text=text,
        advice=""
        if enough
        else "start fewer ranks per node, ask for more memory, or give prothpc preprocess a "
        "smaller --memory",
    )
    small = [one for one in measured if one.values["shared"] < _LEAST_SHARED_MEMORY]
    if small:
        yield Finding(
            check="/dev/shm",
            level="note",
            text=f"{in_bytes(small[0].values['shared'])}{where(small, measured)}",
            advice="MPI and NCCL need more between ranks of a node: docker run --shm-size=1g",
        )


MEMORY = Check(name="memory", measure=_measure_memory, judge=_judge_memory, once_per_node=True)


def _measure_limits(situation: Situation) -> dict[str, Any]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "files": soft,
        "most_files": hard,
        # Each gloo group connects every rank to every other; two of them, as here, are enough.
        "files_needed": _FILES_OF_A_PROCESS + 2 * situation.world.size,
        "address_space": resource.getrlimit(resource.RLIMIT_AS)[0],
        "locked": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "infiniband": Path("/dev/infiniband").exists(),
    }


def _judge_limits(measured: Sequence[Measured]) -> Iterator[Finding]:
    bites = {
        "files": lambda one: (
            one.values["files"] != resource.RLIM_INFINITY
            and one.values["files"] < one.values["files_needed"]
        ),
        "space": lambda one: one.values["address_space"] != resource.RLIM_INFINITY,
        "locked": lambda one: (
            one.values["infiniband"] and one.values["locked"] != resource.RLIM_INFINITY
        ),
    }
    bitten = {name: [one for one in measured if bite(one)] for name, bite in bites.items()}
    if ranks := bitten["files"]:
        values = ranks[0].values
        needed, most = values["files_needed"], values["most_files"]
        locked = most != resource.RLIM_INFINITY and most < needed
        yield Finding(
            check="limits",
            level="note",
            text=f"{values['files']} open files, of which a rank may need {needed}"
            f"{where(ranks, measured)}",
            advice=f"only an administrator can raise the hard limit of {most}"
            if locked
            else f"ulimit -n {needed}, in the job script before the launcher",
        )
    if ranks := bitten["space"]:
        yield Finding(
            check="limits",
            level="note",
            text=f"address space of {in_bytes(ranks[0].values['address_space'])}"
            f"{where(ranks, measured)}",
            advice="CUDA and mapped records need more: ulimit -v unlimited, or a compute node",
        )
    if ranks := bitten["locked"]:
        yield Finding(
            check="limits",
            level="note",
            text=f"{in_bytes(ranks[0].values['locked'])} of locked memory{where(ranks, measured)}",
            advice="InfiniBand needs more: ulimit -l unlimited, in the job script",
        )
    if not any(bitten.values()):
        yield Finding(check="limits", level="ok", text=f"{measured[0].values['files']} open files")


LIMITS = Check(name="limits", measure=_measure_limits, judge=_judge_limits)
