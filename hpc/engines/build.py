"""Which engine a recipe names."""

import torch
from torch import nn

from hpc.config import OptimizerConfig, TrainConfig
from hpc.engines import Engine, LossSums
from hpc.engines.replicas import Communication, ReplicaEngine
from hpc.norms import fuse_norms
from hpc.world import World


def build_engine(
    model: nn.Module,
    loss_sums: LossSums,
    *,
    optimizer: OptimizerConfig,
    train: TrainConfig,
    world: World,
    device: torch.device,
) -> Engine:
    """Connect the ranks and return the engine `train.engine` over them.

    Args:
        model: float32, with the same initial weights on every rank.
        loss_sums: `(model, batch)` → loss sums per objective.
        optimizer: its settings.
        train: engine, precision and loss scale.
        world: what the launcher says of this rank and the others.
        device: where this rank computes.

    Raises:
        InputError: if the engine is not installed, the ranks do not find one another, or the engine
            cannot do what the recipe asks.
    """
    norms = "apex FusedLayerNorm" if fuse_norms(model, device) else "torch LayerNorm"
    engine: Engine
    if train.engine == "deepspeed" and train.zero_stage > 0:
        from hpc.engines.deepspeed_engine import DeepSpeedEngine

        engine = DeepSpeedEngine(
            model, loss_sums, optimizer=optimizer, train=train, world=world, device=device
        )
    else:
        engine = ReplicaEngine(
            model,
            loss_sums,
            optimizer=optimizer,
            train=train,
            communication=_communication(train, world, device),
            world=world,
            device=device,
        )
    engine.kernels = f"{engine.kernels}, {norms}"
    return engine


def _communication(train: TrainConfig, world: World, device: torch.device) -> Communication:
    """Who sums the gradients of whole replicas; libraries are imported where they are used."""
    if train.engine == "horovod":
        from hpc.engines.horovod_engine import HorovodCommunication

        return HorovodCommunication(world)
    if train.engine == "deepspeed":
        from hpc.engines.deepspeed_engine import DeepSpeedCommunication

        return DeepSpeedCommunication(world, device)
    from hpc.engines.torch_engine import TorchCommunication

    return TorchCommunication(world, device)
