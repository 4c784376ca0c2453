"""What our trainer and engines cost beside a bare loop of the same model, optimiser and library.

    mpirun -n 2 python -m hpc.bench.engine_overhead horovod RECORDS OUT.json

The bare loop is what a user would write by hand for the library: forward, backward, reduce, clip,
step, on micro-batches made beforehand; ours is `Trainer` on top of the engine, with loader, target
counts, learning rate and logging. Both take turns in blocks of steps, so that a machine whose speed
drifts slows both alike.
"""

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hpc import launch
from hpc.checkpoint import CheckpointWriter
from hpc.config import Recipe
from hpc.data import Batcher, StreamLoader, open_streams
from hpc.engines.build import build_engine
from hpc.monitor import Monitor
from hpc.optimizers import build_optimizer
from hpc.phases import Inputs, plan_phases
from hpc.stopping import StopSignals
from hpc.tasks import Task, build_task
from hpc.trainer import Trainer
from models.architectures import build_model
from preprocessing.records import RecordSet
from preprocessing.strict import build
from preprocessing.vocabulary import PROTTRANS_BERT

BLOCK_STEPS = 2
"""Few, so that the machine's speed drifts little within a pair of blocks."""
BLOCKS = 60
LOG_BLOCKS = 5
"""Ours logs after so many blocks: every ten steps."""
LR = 1e-4


def main() -> None:
    """Measure one engine; rank 0 writes the ratios of all blocks."""
    engine_name, records, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    world = launch.world_from_environment()
    torch.set_num_threads(1)
    name, _, stage = engine_name.partition("-")
    with tempfile.TemporaryDirectory() as folder:
        recipe = build(Recipe, _recipe(name, int(stage or 0), records, folder), where="bench")
        ours = _ours(recipe)
        bare = _bare(name, int(stage or 0), recipe)
        for _ in range(LOG_BLOCKS):
            ours(), bare()  # warm up
        pairs = []
        for block in range(BLOCKS):
            # Who begins alternates.
            order = (ours, bare) if block % 2 else (bare, ours)
            seconds = {step: _timed(step) for step in order}
            pairs.append((seconds[ours], seconds[bare]))
    ratios = [ours_seconds / bare_seconds for ours_seconds, bare_seconds in pairs]
    if world.rank == 0:
        result = {
            "engine": engine_name,
            "ranks": world.size,
            "ratios": [round(ratio, 4) for ratio in ratios],
            "median": round(statistics.median(ratios), 4),
            "interval_95": _interval_of_median(ratios),
            "bare_ms_per_step": round(
                statistics.median(b for _, b in pairs) / BLOCK_STEPS * 1e3, 2
            ),
        }
        output.write_text(json.dumps(result))
        print(result)
    sys.stdout.flush()
    launch.disconnect()


def _recipe(name: str, stage: int, records: Path, folder: str) -> dict[str, Any]:
    return {
        "model": {
            "hidden_size": 256,
            "layers": 2,
            "heads": 4,
            "intermediate_size": 1024,
            "max_positions": 512,
        },
        "data": {"records": str(records), "length": 256, "bucket_batches": 1},
        "train": {
            "run_dir": folder,
            "steps": 10**6,
            "global_batch": 16,
            "micro_batch": 8,
            "engine": name,
            "zero_stage": stage,
        },
        "optimizer": {"lr": LR},
        "schedule": {"name": "constant"},
        "evaluation": {"every_steps": 0},
        "checkpoint": {"every_steps": 10**6},
        "log": {"every_steps": BLOCK_STEPS * LOG_BLOCKS, "tensorboard": False},
    }


def _interval_of_median(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the order statistics that hold the median with a probability of 95 %."""
    ordered, half = sorted(ratios), 0.98 * math.sqrt(len(ratios))
    low, high = int(len(ratios) / 2 - half), math.ceil(len(ratios) / 2 + half)
    return round(ordered[low], 4), round(ordered[high], 4)


def _timed(block: Callable[[], None]) -> float:
    began = time.perf_counter()
    block()
    return time.perf_counter() - began


def _ours(recipe: Recipe) -> Callable[[], None]:
    """Return a function that trains another block of steps with `Trainer`."""
    world = launch.world_from_environment()
    task = build_task(recipe, PROTTRANS_BERT)
    torch.manual_seed(0)
    engine = build_engine(
        build_model(recipe.model),
        task.loss_sums,
        optimizer=recipe.optimizer,
        train=recipe.train,
        world=world,
        device=torch.device("cpu"),
    )
    records = RecordSet(Path(recipe.data.records))

    def open_inputs(phase: Any) -> Inputs:
        batcher = Batcher(records, PROTTRANS_BERT, phase.data, 0)
        streams = open_streams(
            batcher, phase.data, phase.train, len(records), world.rank, world.size
        )
        return Inputs(StreamLoader(streams, task.prepare), None)

    trainer = Trainer(
        recipe,
        engine=engine,
        task=task,
        phases=plan_phases(recipe, records=len(records), ranks=world.size),
        open_inputs=open_inputs,
        optimizer_steps=0,
        monitor=Monitor(
            Path(recipe.train.run_dir) / str(world.rank),
            steps=recipe.train.steps,
            first_step=0,
            active=False,
            tensorboard=False,
        ),
        writer=CheckpointWriter(Path(recipe.train.run_dir), 0),
        facts={},
    )
    signals = StopSignals()

    def block() -> None:
        for _ in range(BLOCK_STEPS):
            trainer._train_step(signals)
        if trainer.step % recipe.log.every_steps == 0:
            trainer._log()

    return block


def _bare(name: str, stage: int, recipe: Recipe) -> Callable[[], None]:
    """Return a function that trains another block of steps as one would by hand."""
    world = launch.world_from_environment()
    task = build_task(recipe, PROTTRANS_BERT)
    torch.manual_seed(0)
    model = build_model(recipe.model)
    records = RecordSet(Path(recipe.data.records))
    batcher = Batcher(records, PROTTRANS_BERT, recipe.data, 0)
    streams = open_streams(batcher, recipe.data, recipe.train, len(records), world.rank, world.size)
    steps = BLOCK_STEPS * (BLOCKS + LOG_BLOCKS)
    batches = [task.prepare(stream.next()) for _ in range(steps) for stream in streams]
    counts = [float(sum(batch.counts.values())) for batch in batches]
    made = zip(batches, counts, strict=True)
    wrapper = _Loss(model, task)
    optimizer, _ = build_optimizer(model, recipe.optimizer)
    step: Callable[[Any, float], None]
    if name == "deepspeed":
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 8,
            "gradient_clipping": 1.0,
            "steps_per_print": None,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        zero, *_ = deepspeed.initialize(
            model=wrapper, optimizer=optimizer, config=config, dist_init_required=False
        )

        def step(batch: Any, count: float) -> None:
            zero.backward(zero(batch) / count)
            zero.step()

    elif name == "horovod":
        import horovod.torch as hvd

        hooked = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())

        def step(batch: Any, count: float) -> None:
            (wrapper(batch) / count).backward()
            hooked.synchronize()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with hooked.skip_synchronize():
                hooked.step()
            hooked.zero_grad()

    else:
        wrapped: nn.Module = wrapper
        if dist.is_initialized() and world.size > 1:
            wrapped = nn.parallel.DistributedDataParallel(wrapper, gradient_as_bucket_view=True)

        def step(batch: Any, count: float) -> None:
            (wrapped(batch) / count).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def block() -> None:
        for batch, count in islice(made, BLOCK_STEPS * len(streams)):
            step(batch, count)

    return block


class _Loss(nn.Module):
    """The loss sum as a module's forward."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self._task = task

    def forward(self, batch: Any) -> torch.Tensor:
        return self._task.loss_sums(self.model, batch)["mlm"]


if __name__ == "__main__":
    main()
