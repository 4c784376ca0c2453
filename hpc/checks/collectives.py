"""Checks that ranks make together: do sums come out right, how fast, and do clocks agree."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from hpc import launch
from hpc.checks.child import describe
from hpc.checks.findings import Check, Finding, Measured, Situation, nodes, places, where
from hpc.checks.meeting import NETWORK_ADVICE, PATIENCE
from preprocessing import parallel
from preprocessing.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch

SIZES_MIB = (1, 16, 64)
"""Sizes of all-reduces, around the 25 MiB in which DDP sends gradients by default."""

_REPEATS = 5
_SECONDS_PER_SIZE = 4.0
"""A slow network gets fewer repeats,"""

_SLOW_SECONDS = 1.0
"""and no larger sizes when one all-reduce has taken so long."""

_GIGABIT_ETHERNET = 0.125
"""1 Gbit/s in GB/s: a cluster's network that is no faster is not the one that was meant."""

_WORST_SKEW = 1.0
"""Seconds between clocks; above it logs of different nodes cannot be compared."""

_CLOCK_ROUNDS = 5

_WITHOUT_MPI = ("torchrun", "deepspeed", "horovodrun")
"""Launchers whose ranks would be MPI's rank 0 of 1 each, by design."""


_SLOW_ADVICE = {
    "gloo": NETWORK_ADVICE,
    "nccl": NETWORK_ADVICE,
    "MPI": "UCX_NET_DEVICES or OMPI_MCA_btl_tcp_if_include name the network to use; ranks that "
    "share a core wait for one another",
}


def _measure_all_reduce(situation: Situation) -> dict[str, Any]:
    import torch
    from torch import distributed as dist

    on_gpus = _on_all(torch.cuda.is_available(), situation)
    device, backend, members = torch.device("cpu"), "gloo", situation.control
    if on_gpus:
        device, backend = launch.device_of(situation.world), "nccl"
        torch.cuda.set_device(device)
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a timeout raises, rather than aborts
        limit = timedelta(seconds=situation.timeout / PATIENCE)
        members = dist.new_group(backend=backend, timeout=limit)

    def reduce(data: torch.Tensor) -> None:
        dist.all_reduce(data, group=members)
        if on_gpus:
            torch.cuda.synchronize()

    def make(numbers: int) -> torch.Tensor:
        return torch.empty(numbers, dtype=torch.float32, device=device)

    return {"over": backend, "results": _reductions(situation, make, reduce)}


def _measure_mpi(situation: Situation) -> dict[str, Any]:
    import numpy as np

    world = situation.world
    if world.launcher in _WITHOUT_MPI:
        return {"skipped": f"not tried: {world.launcher} starts no MPI ranks"}
    refusal = None
    try:
        parallel.connect(world.size)
    except InputError as error:
        refusal = error
    if not _on_all(refusal is None, situation):
        if refusal is not None and refusal.__cause__ is not None:  # there is no MPI at all
            return {"skipped": describe(refusal)}
        raise refusal or InputError("MPI works here, but not on other ranks")
    mpi = sys.modules["mpi4py.MPI"]  # connect has imported it, which starts MPI

    def reduce(data: np.ndarray) -> None:
        mpi.COMM_WORLD.Allreduce(mpi.IN_PLACE, data)

    def make(numbers: int) -> np.ndarray:
        return np.empty(numbers, np.float32)

    return {"over": "MPI", "results": _reductions(situation, make, reduce)}


def _reductions(
    situation: Situation, make: Callable[[int], Any], reduce: Callable[[Any], None]
) -> list[dict[str, Any]]:
    """Time all-reduces and check their sums.

    Args:
        situation: Names the rank and the group for barriers.
        make: Makes an array of so many float32 numbers.
        reduce: Sums such an array over all ranks, in place.

    Returns:
        For each size `mib`, `correct`, and the algorithm bandwidth `gb_per_second`: bytes of one
        rank's array by time, as nccl-tests defines it (its doc/PERFORMANCE.md); median of repeats.
    """
    from torch import distributed as dist

    world = situation.world
    # Small whole numbers: their sum is exact in float32, in whatever order they are added.
    value = world.rank % 7 + 1
    total = sum(rank % 7 + 1 for rank in range(world.size))
    results = []
    for mib in SIZES_MIB:
        data = make(mib * 2**20 // 4)
        seconds: list[float] = []
        correct, repeats, slowest = True, 1, 0.0
        while len(seconds) <= repeats:  # the first one warms up
            data[:] = value
            dist.barrier(group=situation.control)
            began = time.perf_counter()
            reduce(data)
            seconds.append(time.perf_counter() - began)
            correct = correct and bool((data == total).all())
            if len(seconds) == 1:
                slowest = _greatest(seconds[0], situation)
                repeats = max(1, min(_REPEATS, int(_SECONDS_PER_SIZE / slowest)))
        speed = data.nbytes / statistics.median(seconds[1:]) / 1e9
        results.append({"mib": mib, "gb_per_second": speed, "correct": correct})
        if slowest > _SLOW_SECONDS:
            break
    return results


def _on_all(flag: bool, situation: Situation) -> bool:
    """Whether the flag is set on every rank."""
    return not _greatest(float(not flag), situation)


def _greatest(number: float, situation: Situation) -> float:
    """Return the greatest of all ranks' numbers."""
    import torch
    from torch import distributed as dist

    numbers = torch.tensor([number], dtype=torch.float64)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=situation.control)
    return float(numbers.item())


def _judge_reductions(name: str, measured: Sequence[Measured]) -> Iterator[Finding]:
    skipped = [one for one in measured if "skipped" in one.values]
    if skipped:
        yield Finding(
            check=name,
            level="note",
            text=skipped[0].values["skipped"] + where(skipped, measured),
            advice="prothpc train works so; prothpc preprocess and verify on several ranks need "
            "mpirun or srun --mpi=pmix",
            lacks=("mpi",),
        )
        return
    wrong = [one for one in measured if not all(r["correct"] for r in one.values["results"])]
    if wrong:
        yield Finding(
            check=name,
            level="fail",
            text=f"wrong sums on {places(wrong)}",
            advice="leave these nodes out and report them to the site",
        )
        return
    speeds = {
        result["mib"]: min(one.values["results"][place]["gb_per_second"] for one in measured)
        for place, result in enumerate(measured[0].values["results"])
    }
    over = measured[0].values["over"]
    listed = ", ".join(f"{mib} MiB at {speed:.3g}" for mib, speed in speeds.items())
    slow = nodes(measured) > 1 and max(speeds.values()) < _GIGABIT_ETHERNET
    yield Finding(
        check=name,
        level="note" if slow else "ok",
        text=f"right over {over} and {len(measured)} ranks: {listed} GB/s",
        advice=f"no faster than Gigabit Ethernet: {_SLOW_ADVICE[over]}" if slow else "",
    )


ALL_REDUCE = Check(
    name="all-reduce",
    measure=_measure_all_reduce,
    judge=partial(_judge_reductions, "all-reduce"),
    advice=NETWORK_ADVICE,
)

MPI_ALL_REDUCE = Check(
    name="MPI ranks",
    measure=_measure_mpi,
    judge=partial(_judge_reductions, "MPI ranks"),
    advice="prothpc preprocess and verify would refuse to start; srun --mpi=list shows what this "
    "Slurm knows",
)


def _measure_clocks(situation: Situation) -> dict[str, Any]:
    from torch import distributed as dist

    stamps = []
    for _ in range(_CLOCK_ROUNDS):
        dist.barrier(group=situation.control)
        stamps.append(time.time())
    return {"stamps": stamps}


def _judge_clocks(measured: Sequence[Measured]) -> Iterator[Finding]:
    """Compare with rank 0's clock; ranks leave a barrier within milliseconds of one another."""
    if nodes(measured) == 1:
        return
    reference = measured[0].values["stamps"]
    skews = {
        one.rank: statistics.median(
            stamp - other for stamp, other in zip(one.values["stamps"], reference, strict=True)
        )
        for one in measured
    }
    worst = max(measured, key=lambda one: abs(skews[one.rank]))
    skew = skews[worst.rank]
    fine = abs(skew) < _WORST_SKEW
    yield Finding(
        check="clocks",
        level="ok" if fine else "note",
        text=f"all within {abs(skew):.3f} s of rank 0's"
        if fine
        else f"that of {places([worst])} is {skew:+.1f} s from rank 0's",
        advice="" if fine else "times in logs cannot be compared; report the node to the site",
    )


CLOCKS = Check(name="clocks", measure=_measure_clocks, judge=_judge_clocks)
