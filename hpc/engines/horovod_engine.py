"""Horovod over MPI or gloo: gradients are summed in fixed groups.

Horovod by itself fuses whatever tensors are ready at the same moment, so over gloo with four ranks
the order of a sum, and its last bits, change from run to run. Fixed groups that are not fused with
one another keep them.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hpc.engines.replicas import fixed_groups
from hpc.world import World
from preprocessing.errors import InputError

MAX_GROUP_BYTES = 32 * 2**20
"""Gradients reduced together: more do not gain bandwidth."""

MIN_GROUPS = 8
"""A small model's gradients, too, are summed while the rest of the backward pass goes on."""


class HorovodCommunication:
    """A group is summed as soon as the last of its gradients is there.

    Args:
        world: what the launcher says of this rank and the others.

    Raises:
        InputError: if Horovod is not installed, or sees other ranks than the launcher started.
    """

    needs_warm_up = False

    def __init__(self, world: World) -> None:
        # Read when Horovod starts; without it, groups that happen to be ready together are fused.
        os.environ["HOROVOD_DISABLE_GROUP_FUSION"] = "1"
        try:
            import horovod.torch as hvd
        except ImportError as error:
            raise InputError(
                f"train.engine = 'horovod' needs Horovod, which cannot be imported ({error}): "
                "install it with 'make horovod', or use train.engine=torch"
            ) from error
        hvd.init()
        if hvd.size() != world.size:
            raise InputError(
                f"{world.launcher} started {world.size} ranks but Horovod sees {hvd.size()}: "
                "start it with mpirun, with srun --mpi=pmix and the MPI that Horovod was built "
                "with, or with horovodrun; or use train.engine=torch"
            )
        self._hvd = hvd
        self._groups: list[list[nn.Parameter]] = []
        self._missing: list[int] = []
        self._handles: list[int] = []
        self._last = False

    def wrap(self, module: nn.Module) -> nn.Module:
        """See `Communication.wrap`: the module stays; hooks on its parameters start the sums."""
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        limit = min(MAX_GROUP_BYTES, size // MIN_GROUPS + 1)
        self._groups = fixed_groups(module.parameters(), limit)
        for number, group in enumerate(self._groups):
            for parameter in group:
                parameter.register_post_accumulate_grad_hook(self._hook(number))
        return module

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """See `Communication.accumulating`."""
        self._last = last
        self._missing = [len(group) for group in self._groups]
        yield

    def finish(self) -> None:
        """See `Communication.finish`."""
        for handle in self._handles:
            self._hvd.synchronize(handle)
        self._handles.clear()

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """See `Engine.sum_over_ranks`."""
        tensor = torch.tensor(values, dtype=torch.float64)
        return self._hvd.allreduce(tensor, op=self._hvd.Sum, name="host numbers").tolist()

    def from_rank_0(self, value: Any) -> Any:
        """See `Engine.from_rank_0`."""
        return self._hvd.broadcast_object(value, root_rank=0)

    def close(self) -> None:
        """See `Engine.close`."""
        self._hvd.shutdown()

    def _hook(self, number: int) -> Any:
        def ready(_parameter: torch.Tensor) -> None:
            if not self._last:
                return
            self._missing[number] -= 1
            if self._missing[number] == 0:
                gradients = [parameter.grad for parameter in self._groups[number]]
                self._handles.append(
                    self._hvd.grouped_allreduce_async_(
                        gradients, op=self._hvd.Sum, name=f"gradients {number}"
                    )
                )

        return ready
