"""Plain torch: DistributedDataParallel over gloo or NCCL, and nothing around it on one rank."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hpc import launch
from hpc.world import World


class TorchCommunication:
    """Gradients are summed in buckets while the backward pass runs.

    Args:
        world: this rank and the others.
        device: where this rank computes.

    Raises:
        InputError: if the ranks do not find one another.
    """

    def __init__(self, world: World, device: torch.device) -> None:
        self._world_size = world.size
        # After its first backward pass DistributedDataParallel lays its buckets out anew, in the
        # order in which gradients came; with four ranks that changes the order of sums. A pass
        # that is thrown away makes a resumed run's first step like any other.
        self.needs_warm_up = world.size > 2
        self._ddp: DistributedDataParallel | None = None
        if not dist.is_initialized():
            launch.connect(world, backend="nccl" if device.type == "cuda" else "gloo")
        # Counts and stop flags are host numbers: over gloo they cost the GPU no synchronisation.
        self._host_group = None
        if world.size > 1 and device.type == "cuda":
            self._host_group = dist.new_group(backend="gloo")

    def wrap(self, module: nn.Module) -> nn.Module:
        """See `Communication.wrap`."""
        if self._world_size == 1:
            return module
        self._ddp = DistributedDataParallel(module, gradient_as_bucket_view=True)
        self._ddp.register_comm_hook(None, _sum_bucket)
        return self._ddp

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """See `Communication.accumulating`."""
        return nullcontext() if last or self._ddp is None else self._ddp.no_sync()

    def finish(self) -> None:
        """See `Communication.finish`: the backward pass has waited already."""

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """See `Engine.sum_over_ranks`."""
        if self._world_size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self._host_group)
        return sums.tolist()

    def from_rank_0(self, value: Any) -> Any:
        """See `Engine.from_rank_0`."""
        if self._world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._host_group)
        return box[0]

    def close(self) -> None:
        """See `Engine.close`."""
        launch.disconnect()


def _sum_bucket(_state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sum a bucket over the ranks; DistributedDataParallel alone would average."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
