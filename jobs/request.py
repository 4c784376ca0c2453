"""What is asked for: a stage, on a site, for a time; complete, and checked against the site."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jobs.site import Profile, Queue
from jobs.stages import Stage
from jobs.times import MINUTE, in_slurm, parse_time
from preprocessing.errors import InputError

_SHORT = 4
"""A job whose lead would be more than one part in so many of its time uses that part."""

_LEAST_LEAD = 20
"""Seconds; Slurm looks at limits every 30 s, so that less says little."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A job to be.

    Attributes:
        stage: What it runs.
        arguments: The stage's own arguments, as typed.
        directory: What the stage makes.
        working_directory: Where the arguments' paths begin.
        profile: The site.
        nodes: Compute nodes.
        seconds: Wall time; None where the site asks for none.
        engine: What distributes the training; for other stages, torch.
        streams: Micro-batches in a global step, which the ranks have to share evenly; 0: no matter.
        steps: Of the whole training; for other stages 0.
        ranks_per_node: As asked for, or 0 for the site's.
        project: Whom the time is charged to.
        queue: As asked for, or empty for the site's.
        racks: Whether to ask for whole racks.
        chain: Jobs that follow one another, at most.
        tasks: Tasks of a job array; 0: no array.
        tasks_at_once: How many of them may run at a time; 0: all.
        after: Job that has to succeed first.
        environment: Directory, archive or container image with prothpc in it.
        records: Record set to copy to the nodes' own disks first.
        preflight: Whether `prothpc doctor` looks at the nodes first.
    """

    stage: Stage
    arguments: tuple[str, ...]
    directory: Path
    working_directory: Path
    profile: Profile
    nodes: int
    seconds: int | None
    engine: str = "torch"
    streams: int = 0
    steps: int = 0
    ranks_per_node: int = 0
    project: str = ""
    queue: str = ""
    racks: bool = False
    chain: int = 1
    tasks: int = 0
    tasks_at_once: int = 0
    after: str = ""
    environment: Path | None = None
    records: Path | None = None
    preflight: bool = True

    def __post_init__(self) -> None:
        """Check it against the site.

        Raises:
            InputError: naming the option, what the site says, and what would do.
        """
        self._check_required()
        self._check_nodes()
        self._check_queue()
        self._check_ranks()
        self._check_sequence()
        self._check_files()

    @property
    def launch(self) -> str:
        """Kind of the launch line."""
        return "mpi" if self.stage.launch == "mpi" else self.engine

    @property
    def ranks(self) -> int:
        """Ranks of all nodes."""
        return self.nodes * self.ranks_on_node

    @property
    def ranks_on_node(self) -> int:
        """Ranks of a node: as asked for, or one a GPU, or, for stages on CPUs, one a core."""
        node = self.profile.site.node
        fitting = node.gpus if self.stage.work == "training" else node.cores
        return self.ranks_per_node or max(1, fitting)

    @property
    def cores_per_rank(self) -> int:
        """Cores of a rank; 1 where the site does not say how many a node has."""
        return max(1, self.profile.site.node.cores // self.ranks_on_node)

    @property
    def lead(self) -> int:
        """Seconds before the end at which the warning comes; 0 where there is none."""
        if not self.stage.restarts or self.seconds is None:
            return 0
        usual = parse_time(self.profile.site.stop.lead)
        lead = min(usual, max(_LEAST_LEAD, self.seconds // _SHORT))
        if self.profile.site.scheduler == "lsf":
            lead = max(MINUTE, lead // MINUTE * MINUTE)
        return lead

    @property
    def queue_name(self) -> str:
        """The queue; empty: the scheduler's default."""
        return self.queue or self.profile.site.queue

    @cached_property
    def placeholders(self) -> dict[str, int]:
        """Values for the braces of a profile's lines."""
        node, racks = self.profile.site.node, self.profile.site.racks
        return {
            "nodes": self.nodes,
            "ranks": self.ranks,
            "ranks_per_node": self.ranks_on_node,
            "cores": node.cores,
            "cores_per_rank": self.cores_per_rank,
            "gpus": node.gpus,
            "racks": self.nodes // racks.nodes if racks.nodes else 0,
            "total_cores": self.nodes * node.cores,
            "total_cores_and_one": self.nodes * node.cores + 1,
        }

    def filled(self, line: str) -> str:
        """Return a profile's line with the braces filled."""
        return re.sub(r"\{(\w+)\}", lambda match: str(self.placeholders[match[1]]), line)

    def _check_required(self) -> None:
        site, name = self.profile.site, self.profile.name
        if site.submit.project == "required" and not self.project:
            raise InputError(f"--project is missing: {name} charges every job to one")
        if self.project and site.scheduler == "local":
            raise InputError("--project means nothing on this machine: leave it out")
        if site.submit.time == "required" and self.seconds is None:
            raise InputError(
                f"--time is missing: {name} ends every job at its wall time; say how long, as in "
                "--time 02:00:00"
            )

    def _check_nodes(self) -> None:
        racks, name = self.profile.site.racks, self.profile.name
        if self.nodes < 1:
            raise InputError(f"--nodes {self.nodes} is no number of nodes")
        if self.profile.site.scheduler == "local" and self.nodes > 1:
            raise InputError(f"--nodes {self.nodes}: this machine is one node")
        if not self.racks:
            return
        if not racks.nodes:
            raise InputError(f"--whole-racks: the profile of {name} does not say how racks are")
        if self.nodes % racks.nodes:
            below = self.nodes // racks.nodes * racks.nodes
            near = f"{below} or {below + racks.nodes}" if below else str(racks.nodes)
            raise InputError(
                f"--nodes {self.nodes} are no whole racks of {racks.nodes} nodes: use {near}"
            )

    def _check_queue(self) -> None:
        queues, name = self.profile.site.queues, self.profile.name
        if self.queue and self.profile.site.scheduler == "local":
            raise InputError("--queue means nothing on this machine: leave it out")
        if self.queue and queues and self.queue not in queues:
            near = difflib.get_close_matches(self.queue, queues, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise InputError(
                f"--queue {self.queue} is not in the profile of {name}: {meant}it has "
                f"{', '.join(queues)}; another one goes into a profile of your own"
            )
        queue = queues.get(self.queue_name, Queue())
        if self.chain > 1 and not queue.chain:
            raise InputError(
                f"--chain {self.chain}: the queue {self.queue_name} of {name} prohibits chains"
            )
        if queue.bins:
            self._check_bins(queue)

    def _check_bins(self, queue: Queue) -> None:
        where = f"the queue {self.queue_name} of {self.profile.name}"
        limit = next((limit for limit in queue.bins if self.nodes <= limit.nodes), None)
        if limit is None:
            raise InputError(
                f"--nodes {self.nodes} is more than {where} takes, {queue.bins[-1].nodes}"
            )
        longest = parse_time(limit.time)
        if self.seconds is not None and self.seconds > longest:
            fitting = [b.nodes for b in queue.bins if parse_time(b.time) >= self.seconds]
            smallest = next((b.nodes for b in queue.bins if b.nodes in fitting), 0)
            before = [b.nodes for b in queue.bins if b.nodes < smallest]
            more = f", or use more than {before[-1]} nodes" if fitting and before else ""
            raise InputError(
                f"--time {in_slurm(self.seconds)} is more than {where} gives to {self.nodes} "
                f"nodes, {in_slurm(longest)}: ask for that and let --chain go on{more}"
            )

    def _check_ranks(self) -> None:
        node, name = self.profile.site.node, self.profile.name
        if self.ranks_per_node < 0:
            raise InputError(f"--ranks-per-node {self.ranks_per_node} is no number of ranks")
        if node.cores and self.ranks_on_node > node.cores:
            raise InputError(
                f"--ranks-per-node {self.ranks_on_node} is more than the {node.cores} cores that "
                f"a job has on a node of {name}"
            )
        if self.stage.work == "training" and 0 < node.gpus < self.ranks_on_node:
            raise InputError(
                f"--ranks-per-node {self.ranks_on_node} is more than the {node.gpus} GPUs of a "
                f"node of {name}: each rank needs its own"
            )
        if self.streams and self.streams % self.ranks:
            divisors = [n for n in range(1, self.streams + 1) if self.streams % n == 0]
            near = sorted(divisors, key=lambda n: abs(n - self.ranks))[:3]
            raise InputError(
                f"{self.nodes} nodes with {self.ranks_on_node} ranks each are {self.ranks} ranks, "
                f"which cannot share the recipe's {self.streams} micro-batches a step "
                f"(train.global_batch / train.micro_batch) evenly: use "
                f"{' or '.join(map(str, sorted(near)))} ranks, or change the batch"
            )

    def _check_sequence(self) -> None:
        stage, scheduler = self.stage, self.profile.site.scheduler
        if self.chain < 1:
            raise InputError(f"--chain {self.chain} is no number of jobs")
        if self.chain > 1 and not stage.restarts:
            raise InputError(f"--chain {self.chain}: {stage.name} does not go on where it ended")
        if self.tasks and not stage.array:
            raise InputError(f"--array: {stage.name} shares its work among its ranks by itself")
        if self.tasks and self.chain > 1:
            raise InputError("--array and --chain cannot be combined: a task restarts by itself")
        if scheduler == "local" and (self.tasks or self.after or self.chain > 1):
            raise InputError(
                "--array, --after and --chain need a scheduler: this machine has none; a job here "
                "restarts by itself"
            )

    def _check_files(self) -> None:
        site = self.profile.site
        if self.records is not None and not site.burst_buffer.path:
            raise InputError(
                f"--burst-buffer: the profile of {self.profile.name} names no disk in the nodes "
                "(burst_buffer.path)"
            )


def parse_array(text: str) -> tuple[int, int]:
    """Return the tasks of an array, and how many may run at once, of `10` or `10%4`.

    Raises:
        InputError: another form.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})(?:%([1-9]\d{0,5}))?", text, re.ASCII)
    if match is None:
        raise InputError(
            f"--array {text}: write the number of tasks, and after % how many may run at once, "
            "as in 10%4"
        )
    return int(match[1]), int(match[2] or 0)


def parse_job_id(text: str) -> str:
    """Return the number of a job.

    Raises:
        InputError: it is none.
    """
    if not re.fullmatch(r"[1-9]\d{0,11}", text, re.ASCII):
        raise InputError(f"--after {text} is no job's number")
    return text
