"""What a check is: it measures on every rank, and judges the measurements of all ranks at once."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpc.checks.child import describe
from hpc.world import World

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What measuring may depend on.

    Attributes:
        world: Place of this rank.
        directory: Directory to try out.
        size: Bytes that each node writes there.
        timeout: Seconds after which whatever does not answer counts as hung.
        site: Profile to compare the machine with, if any.
        control: Group of torch.distributed, on CPUs, once the ranks have met.
    """

    world: World
    directory: Path
    size: int
    timeout: float
    site: str | None = None
    control: Any = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a check measured on one rank.

    Attributes:
        rank: Number of the rank.
        host: Name of its node.
        values: What was measured, as JSON knows it. `trouble` alone says that measuring failed.
    """

    rank: int
    host: str
    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        check: What was looked at.
        level: `ok`; `note`, something to know that stops nobody; `fail`, something to mend.
        text: What was found.
        advice: What to do about it, if anything.
        lacks: Names for `--require` of what does not work here.
    """

    check: str
    level: Literal["ok", "note", "fail"]
    text: str
    advice: str = ""
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Check:
    """One subject.

    Attributes:
        name: In the report.
        measure: Called on the ranks. Where it raises, or hangs, or the process dies of it, the
            check has failed there.
        judge: Called on rank 0 with the measurements of all ranks that made one, in their order.
        advice: What to do where measuring failed.
        once_per_node: Only the first rank of each node measures.
    """

    name: str
    measure: Callable[[Situation], dict[str, Any]]
    judge: Callable[[Sequence[Measured]], Iterator[Finding]]
    advice: str = ""
    once_per_node: bool = False

    def values(self, situation: Situation) -> dict[str, Any]:
        """Measure; an error becomes the measurement `trouble`."""
        try:
            return self.measure(situation)
        except Exception as error:
            return {"trouble": describe(error), "traceback": traceback.format_exc()}

    def findings(self, measured: Sequence[Measured]) -> Iterator[Finding]:
        """Judge sound measurements; name the ranks that could not make one."""
        sound = [one for one in measured if "trouble" not in one.values]
        troubled = [one for one in measured if "trouble" in one.values]
        for trouble, ranks in group(troubled, lambda one: one.values["trouble"]).items():
            yield Finding(
                check=self.name,
                level="fail",
                text=f"{trouble}{where(ranks, measured)}",
                advice=self.advice,
            )
        if sound:
            yield from self.judge(sound)


def group(
    measured: Sequence[Measured], key: Callable[[Measured], Hashable]
) -> dict[Any, list[Measured]]:
    """Sort measurements into groups of equal key, in the order in which keys first appear."""
    groups: dict[Any, list[Measured]] = {}
    for one in measured:
        groups.setdefault(key(one), []).append(one)
    return groups


def where(some: Sequence[Measured], measured: Sequence[Measured]) -> str:
    """Name ranks and hosts in brackets; nothing if there is only one rank, or all are meant."""
    if len(some) == len(measured):
        return ""
    return f" ({places(some)})"


def places(measured: Sequence[Measured]) -> str:
    """Name ranks and hosts, like `rank 3 on node2` or `ranks 0-7 on 2 nodes: node1, node2`."""
    ranks = sorted(one.rank for one in measured)
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], rank]
        else:
            spans.append([rank])
    numbers = ", ".join("-".join(map(str, span)) for span in spans)
    hosts = list(dict.fromkeys(one.host for one in measured))
    names = ", ".join(hosts[:_HOSTS_NAMED]) + (", ..." if len(hosts) > _HOSTS_NAMED else "")
    there = names if len(hosts) == 1 else f"{len(hosts)} nodes: {names}"
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers} on {there}"


_HOSTS_NAMED = 4


def nodes(measured: Sequence[Measured]) -> int:
    """Count the nodes."""
    return len({one.host for one in measured})


def in_bytes(count: float) -> str:
    """Write a number of bytes for people, like `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
