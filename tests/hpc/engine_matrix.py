"""Engines × precisions × optimisers × numbers of ranks, each cell against fp32 torch on one rank.

`python engine_matrix.py --write FILE` runs everything and writes the table; under a launcher,
`python engine_matrix.py ENGINE PLAN.json RESULTS.json` runs the cells of one engine in one group.
"""

import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

ENGINES = ("torch", "horovod", "deepspeed-0", "deepspeed-1", "deepspeed-2", "deepspeed-3")
PRECISIONS = ("fp32", "amp-bf16", "bf16", "amp-fp16", "fp16-master", "fp16")
OPTIMIZERS = ("adamw", "lamb-txl", "lamb-apex", "lamb-deepspeed", "lamb-you2020")
RANKS = (2, 4)
STEPS = 6

TOLERANCES = {
    # Greatest relative difference of a loss, over the steps: fp32 differs by the order of sums,
    # the others by their 8 (bfloat16) or 11 (float16) bits.
    "fp32": 1e-5,
    "amp-bf16": 5e-3,
    "bf16": 5e-3,
    "amp-fp16": 1e-3,
    "fp16-master": 1e-3,
    "fp16": 1e-3,
}


def allowed_refusal(engine: str, precision: str, optimizer: str) -> bool:
    """Cells that may be refused, and are, with a reason; all others have to work."""
    zero = engine in ("deepspeed-1", "deepspeed-2", "deepspeed-3")
    return zero and (
        precision == "fp16"
        or (precision == "fp16-master" and not cpu_has_float16())
        or (engine == "deepspeed-3" and optimizer.startswith("lamb"))
    )


def cpu_has_float16() -> bool:
    """Whether this CPU computes in float16, as DeepSpeed asks it."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def run_cell(engine_name: str, precision: str, optimizer: str, batches: list[list[Any]]) -> Any:
    """Train a tiny BERT for a few steps; return its losses, or the sentence of a refusal."""
    import torch

    from hpc import launch
    from hpc.config import ObjectiveConfig, OptimizerConfig, TrainConfig
    from hpc.engines.build import build_engine
    from hpc.tasks import MaskedLanguageModel
    from models.bert import Bert, BertConfig
    from preprocessing.errors import InputError
    from preprocessing.vocabulary import PROTTRANS_BERT

    world = launch.world_from_environment()
    device = launch.device_of(world)
    name, _, stage = engine_name.partition("-")
    train = TrainConfig(
        run_dir="",
        steps=STEPS,
        global_batch=8,
        micro_batch=1,
        engine=name,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        loss_scale=256.0,
        zero_stage=int(stage or 0),  # type: ignore[arg-type]
    )
    kind, _, variant = optimizer.partition("-")
    settings = OptimizerConfig(name=kind, variant=variant or None, lr=1e-2)  # type: ignore[arg-type]
    task = MaskedLanguageModel(ObjectiveConfig(), PROTTRANS_BERT)
    torch.manual_seed(1)
    model = Bert(
        BertConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64, max_positions=128)
    )
    try:
        engine = build_engine(
            model,
            task.loss_sums,
            optimizer=settings,
            train=train,
            world=world,
            device=device,
        )
    except InputError as error:
        return str(error)
    losses = []
    for step in batches:
        prepared = [task.prepare(batch) for batch in step]
        total = float(sum(batch.counts["mlm"] for batch in prepared))
        share = len(prepared) // world.size
        mine = prepared[world.rank * share : (world.rank + 1) * share]
        parts = [
            engine.micro_step(batch.to(device), {"mlm": total}, last=batch is mine[-1])
            for batch in mine
        ]
        losses += engine.sum_over_ranks([float(sum(parts))])
        engine.step(1e-2)
    return losses


def make_batches(records: Path) -> list[list[Any]]:
    """Eight micro-batches a step, of unequal length and target counts."""
    from hpc.config import DataConfig, TrainConfig
    from hpc.data import Batcher, open_streams
    from preprocessing.records import RecordSet
    from preprocessing.vocabulary import PROTTRANS_BERT

    data = DataConfig(records="", length=96, block_records=8, bucket_batches=2)
    train = TrainConfig(run_dir="", steps=1, global_batch=24, micro_batch=3)
    record_set = RecordSet(records)
    batcher = Batcher(record_set, PROTTRANS_BERT, data, 0)
    streams = open_streams(batcher, data, train, len(record_set), 0, 1)
    return [[stream.next() for stream in streams] for _ in range(STEPS)]


def all_cells() -> list[tuple[str, str]]:
    """Every precision with every optimiser."""
    return list(itertools.product(PRECISIONS, OPTIMIZERS))


def launch_group(
    engine: str, ranks: int, cells: list[tuple[str, str]], records: Path, folder: Path
) -> dict[str, Any]:
    """Run cells of one engine under mpirun (one rank: without); return their results.

    Raises:
        RuntimeError: if the group fails.
    """
    plan, results = folder / "plan.json", folder / "results.json"
    plan.write_text(json.dumps({"records": str(records), "cells": cells}))
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    launcher = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]
    run = subprocess.run(
        [*(launcher if ranks > 1 else []), sys.executable, __file__, engine, plan, results],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(f"{engine} on {ranks} ranks failed:\n{run.stdout}\n{run.stderr}")
    return json.loads(results.read_text())


def deviation(losses: list[float], reference: list[float]) -> float:
    """Greatest relative difference over the steps."""
    return max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))


def write_table(path: Path) -> None:
    """Run every cell and write the table; exit 1 if a cell is not as it should be."""
    from preprocessing.generate import generate
    from preprocessing.options import PreprocessOptions
    from preprocessing.synthetic import SynthesisOptions, synthesize

    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fasta, records = folder / "corpus.fasta", folder / "records"
        synthesize(fasta, SynthesisOptions(records=400, families=8, median_length=80))
        generate([fasta], records, PreprocessOptions(shards=4))
        reference = launch_group("torch", 1, all_cells(), records, folder)
        rows = []
        for engine, ranks in itertools.product(ENGINES, RANKS):
            print(f"{engine} on {ranks} ranks", flush=True)
            results = launch_group(engine, ranks, all_cells(), records, folder)
            for optimizer in OPTIMIZERS:
                row = [engine, str(ranks), optimizer]
                for precision in PRECISIONS:
                    result = results[f"{precision} {optimizer}"]
                    refused = isinstance(result, str)
                    as_it_should = refused == allowed_refusal(engine, precision, optimizer)
                    if refused:
                        row.append("refused")
                    else:
                        off = deviation(result, reference[f"fp32 {optimizer}"])
                        as_it_should &= off <= TOLERANCES[precision]
                        row.append(f"{off:.0e}")
                    if not as_it_should:
                        row[-1] += " **BAD**"
                        bad += 1
                rows.append(row)
    path.write_text(_markdown(rows))
    print(f"{path}: {len(rows) * len(PRECISIONS)} cells, {bad} bad")
    sys.exit(1 if bad else 0)


def _markdown(rows: list[list[str]]) -> str:
    import torch

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("deepspeed", "horovod", "mpi4py"):
        versions.append(f"{package} {importlib.metadata.version(package)}")
    head = ["engine", "ranks", "optimiser", *PRECISIONS]
    lines = [head, ["---"] * len(head), *rows]
    return f"""# Engines, precisions and optimisers

Greatest relative difference of the loss from fp32 torch on one rank, over {
        STEPS
    } steps of a tiny BERT
with unequal target counts, gradient accumulation and clipping. Tolerances: {
        ", ".join(f"{name} {value:g}" for name, value in TOLERANCES.items())
    }. "refused" cells end with a sentence that names the alternative; a test holds their list.

Repeat with `make test-matrix`. {platform.machine()}, {os.cpu_count()} cores, CPU only; {
        ", ".join(versions)
    }; commit {commit}.

{chr(10).join("| " + " | ".join(line) + " |" for line in lines)}
"""


def main() -> None:
    """Write the table, or run the cells of one engine and let rank 0 write what came out."""
    if sys.argv[1] == "--write":
        write_table(Path(sys.argv[2]))
    engine, cells_file, results_file = sys.argv[1:]
    plan = json.loads(Path(cells_file).read_text())
    batches = make_batches(Path(plan["records"]))
    results = {
        f"{precision} {optimizer}": run_cell(engine, precision, optimizer, batches)
        for precision, optimizer in plan["cells"]
    }
    from hpc import launch

    if launch.world_from_environment().rank == 0:
        Path(results_file).write_text(json.dumps(results))
    launch.disconnect()


if __name__ == "__main__":
    main()
