"""A training step of Transformer-XL beside transformers' TransfoXL: same weights, same tokens.

`make bench-transfoxl` runs it in the environment of transformers 4.37.2, the last that runs
TransfoXL. A step is forward, loss and backward of one segment with a full memory, without an
optimiser; steps are taken in turn. Prints the rows of docs/benchmarks/transformer-xl.md.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from models.convert import to_hugging_face
from models.transformer_xl import TransformerXL, TransformerXLConfig
from preprocessing.vocabulary import PROTTRANS_BERT

PAIRS = 11

SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    # Lanes, and a model; the segment is as long as the memory.
    "2 layers of ProtTXL": (1, {"layers": 2, "memory_length": 512}),
    "2 layers of ProtTXL-BFD": (
        1,
        {"layers": 2, "heads": 14, "head_size": 128, "memory_length": 512},
    ),
    "prottxl-tiny": (
        8,
        {
            "hidden_size": 128,
            "layers": 3,
            "heads": 2,
            "intermediate_size": 512,
            "memory_length": 64,
        },
    ),
}


def main() -> None:
    """Time all sizes, or, as a child, take steps of one side and print their peak memory."""
    warnings.simplefilter("ignore")
    if len(sys.argv) > 1:
        print(_peak_mib(sys.argv[1], sys.argv[2]))
        return
    print(
        "| model | ratio of CPU time | least and greatest | ours | TransfoXL | memory: ours | T. |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in SIZES:
        ours, theirs = _steps(name)
        pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(PAIRS + 1)][1:]
        ratios = [b / a for a, b in pairs]
        own, other = (statistics.median(side) for side in zip(*pairs, strict=True))
        memory = [
            subprocess.run(
                [sys.executable, "-m", "hpc.bench.transfoxl_step", name, side],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()[-1]
            for side in ("ours", "theirs")
        ]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"| {name} | {statistics.median(ratios):.2f} | {spread} | "
            f"{own * 1e3:,.0f} ms | {other * 1e3:,.0f} ms | {memory[0]} MiB | {memory[1]} MiB |",
            flush=True,
        )


def _steps(name: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a training step of each side, which goes on with its memory each time."""
    from transformers import TransfoXLLMHeadModel  # type: ignore[attr-defined]  # older ones have

    lanes, sizes = SIZES[name]
    config = TransformerXLConfig(**sizes, initial_memory="zeros")
    torch.manual_seed(0)
    model = TransformerXL(config)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        to_hugging_face(model.state_dict(), config, PROTTRANS_BERT.tokens, {}, directory)
        reference = TransfoXLLMHeadModel.from_pretrained(directory).train()
    tokens_BL = torch.randint(5, 30, (lanes, config.memory_length + 1))
    inputs_BL, labels_BL = tokens_BL[:, :-1], tokens_BL[:, 1:]
    kept: dict[str, Any] = {"ours": None, "theirs": None}

    def ours() -> None:
        logits_BLV, kept["ours"] = model(inputs_BL, kept["ours"])
        F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten()).backward()
        model.zero_grad()

    def theirs() -> None:
        output = reference(input_ids=inputs_BL, mems=kept["theirs"])
        kept["theirs"] = output.mems
        log_probabilities = output.prediction_scores.flatten(0, 1)
        F.nll_loss(log_probabilities, labels_BL.flatten()).backward()
        reference.zero_grad()

    return ours, theirs


def _seconds(step: Callable[[], None]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def _peak_mib(name: str, side: str) -> int:
    """Return by how much three steps raise the peak of a fresh process's resident memory."""
    step = _steps(name)[side == "theirs"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


if __name__ == "__main__":
    main()
