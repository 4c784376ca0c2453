"""Let the ranks meet: exchange what each measured alone, and measure together."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

from hpc import launch
from hpc.checks.findings import Check, Finding, Measured, Situation, group, places
from preprocessing.errors import InputError

Item = tuple[str, str, Any]
"""Kind of a message, name of a check, and what the kind needs."""

PATIENCE = 3
"""A collective has this part of the time limit, and so has the roll call after it."""

_HUNG_CHECKS = 3
"""So many checks may hang on a rank until the others give it up."""

_POLL_SECONDS = 0.01

NETWORK_ADVICE = (
    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network to use; NCCL_DEBUG=INFO tells "
    "what NCCL does"
)


def together(
    situation: Situation, shared: Sequence[Check], receive: Callable[[], dict[str, Any]]
) -> Iterator[Item]:
    """Meet the other ranks, exchange what every rank measures alone, and measure together.

    Args:
        situation: What measuring may depend on.
        shared: Checks that all ranks make at the same time.
        receive: Waits for what this rank measures alone: measurements by name of the check.

    Yields:
        `begins` with the name of a check and the seconds that it may take; `met` when `receive` is
        called next; and, on rank 0, `all` with the name of a check and the measurements of all
        ranks that made one.

    Raises:
        InputError: The ranks do not meet, or some no longer answer.
    """
    from torch import distributed as dist

    limit = situation.timeout
    yield "begins", MEETING.name, limit
    launch.connect(situation.world, backend="gloo", timeout=limit)
    # The default group waits for long. It serves to find out who is missing, and to exchange.
    part = timedelta(seconds=limit / PATIENCE)
    situation = replace(situation, control=dist.new_group(backend="gloo", timeout=part))
    gathered = _gather(situation, {MEETING.name: MEETING.measure(situation)})
    yield from _for_all(gathered)
    hosts = [host for host, _ in gathered]
    yield "met", MEETING.name, None

    own = receive()
    yield "begins", REPORTS.name, 2 * _HUNG_CHECKS * limit
    _call_roll(REPORTS, situation, hosts, _HUNG_CHECKS * limit, True)
    yield from _for_all(_gather(situation, own))
    for check in shared:
        yield "begins", check.name, limit
        values = check.values(situation)
        sound = _call_roll(check, situation, hosts, limit / PATIENCE, "trouble" not in values)
        yield from _for_all(_gather(situation, {check.name: values}))
        if not sound:
            break  # a group in which a rank gave up is of no more use
    yield "begins", FAREWELL.name, limit
    launch.disconnect()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and not mpi.Is_finalized():
        mpi.Finalize()


def _gather(situation: Situation, own: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return host and measurements of each rank, in order, on rank 0; elsewhere nothing."""
    from torch import distributed as dist

    here = situation.world.rank == 0
    gathered: list[Any] | None = [None] * situation.world.size if here else None
    dist.gather_object((socket.gethostname(), own), gathered)
    return gathered or []


def _for_all(gathered: list[tuple[str, dict[str, Any]]]) -> Iterator[Item]:
    """Sort by checks; rank 0, which measures whatever is measured, has all their names."""
    for name in gathered[0][1] if gathered else ():
        measured = [
            Measured(rank=rank, host=host, values=own[name])
            for rank, (host, own) in enumerate(gathered)
            if name in own
        ]
        yield "all", name, [asdict(one) for one in measured]


def _call_roll(
    check: Check, situation: Situation, hosts: list[str], seconds: float, sound: bool
) -> bool:
    """Wait for all ranks and return whether all are sound; rank 0 names those that do not come.

    They sign up in the store through which they met: unlike a collective it needs no rank but 0.
    """
    from torch import distributed as dist

    world = situation.world
    store = dist.PrefixStore(f"doctor/{check.name}", dist.distributed_c10d._get_default_store())
    store.set(str(world.rank), "here")
    store.add("sound", int(sound))
    store.add("ranks", 1)
    if world.rank:
        # Rank 0 may come as late as any other, and then wait for another.
        store.wait(["all"], timedelta(seconds=2 * seconds))
        return store.add("sound", 0) == world.size
    deadline = time.monotonic() + seconds
    while store.add("ranks", 0) < world.size:
        if time.monotonic() > deadline:
            missing = [rank for rank in range(world.size) if not store.check([str(rank)])]
            lost = [Measured(rank=rank, host=hosts[rank], values={}) for rank in missing]
            raise InputError(f"no answer any more from {places(lost)}")
        time.sleep(_POLL_SECONDS)
    store.set("all", "here")
    return store.add("sound", 0) == world.size


def _judge_meeting(measured: Sequence[Measured]) -> Iterator[Finding]:
    size, launcher = len(measured), measured[0].values["launcher"]
    per_node = {host: len(ranks) for host, ranks in group(measured, lambda m: m.host).items()}
    counts = set(per_node.values())
    if len(per_node) == 1:
        spread = f"on one node, {measured[0].host}"
    elif len(counts) == 1:
        spread = f"on {len(per_node)} nodes, {counts.pop()} on each"
    else:
        listed = ", ".join(f"{host} {count}" for host, count in per_node.items())
        spread = f"on {len(per_node)} nodes, unevenly: {listed}"
    yield Finding(
        check=MEETING.name, level="ok", text=f"{size} started by {launcher}, met {spread}"
    )


MEETING = Check(
    name="ranks",
    measure=lambda situation: asdict(situation.world),
    judge=_judge_meeting,
    advice="look for a rank that died or never started; use the launcher of mpi4py's MPI; "
    f"{NETWORK_ADVICE}; --timeout gives a large job longer",
)

REPORTS = Check(
    name="reports",
    measure=lambda _: {},
    judge=lambda _: iter(()),
    advice="look at these ranks and their nodes; --timeout gives slow ones longer",
)
"""The arrival of what ranks measured alone; worth a line only where it fails."""

FAREWELL = Check(
    name="farewell",
    measure=lambda _: {},
    judge=lambda _: iter(()),
    advice="MPI_Finalize or the end of torch.distributed hangs or crashes: ask the site",
)
"""The end of the connections; worth a line only where it fails."""
