"""`make demo`: the whole way from FASTA to an exported model, on this machine, in minutes.

Every stage is an ordinary command, printed before it runs, for a reader to copy.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from hpc.metrics import read_metrics
from hpc.plots import plot_loss

FOLDER = Path("runs/demo")
RANKS = 2
STOP_AT_STEP = 150

_ENVIRONMENT = {
    # mpirun refuses root unless told twice; containers and fresh machines are often root's.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    # Open MPI refuses more ranks than cores: version 5 and 4 are told by these that it may.
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMP_NUM_THREADS": "1",
}


def main() -> None:
    """Run the stages, then sum up; any failure ends the demo with that stage's exit code."""
    began = time.monotonic()
    corpus, records, run = FOLDER / "corpus.fasta", FOLDER / "records", FOLDER / "protbert-tiny"
    model, picture = FOLDER / "model", FOLDER / "loss.png"
    if FOLDER.exists():
        print(f"removing the last demo's {FOLDER}")
        shutil.rmtree(FOLDER)
    FOLDER.mkdir(parents=True)
    mpirun = ["mpirun", "-n", str(RANKS)]
    training = ["train", "protbert-tiny", f"data.records={records}", f"train.run_dir={run}"]

    stage("A UniRef-like corpus: 16 protein families, 6,000 proteins")
    options = "--records 6000 --families 16 --median-length 100 --min-identity 0.7"
    command("prothpc", "synthesize", corpus, *options.split())

    stage(f"FASTA to sharded Arrow records, with {RANKS} MPI ranks")
    command(
        *mpirun, "prothpc", "preprocess", corpus, "--output", records,
        *["--holdout", "0.04", "--min-length", "30", "--shards", "8"],
    )  # fmt: skip
    command("prothpc", "verify", records)

    stage(f"Train a small ProtBert with {RANKS} ranks; stop half way")
    command(*mpirun, "prothpc", *training, f"train.stop_at_step={STOP_AT_STEP}")

    stage("Go on from the checkpoint to the end")
    command(*mpirun, "prothpc", *training)

    stage("Export for Hugging Face transformers")
    command("prothpc", "export", run, model, "--format", "hf")

    plot_loss(run, picture)
    print(summary(records, run, model, picture, time.monotonic() - began))


def stage(title: str) -> None:
    """Print a heading."""
    print(f"\n== {title}", flush=True)


def command(*words: object) -> None:
    """Print a command and run it with this environment's programs first on PATH."""
    arguments = [str(word) for word in words]
    print(f"$ {shlex.join(arguments)}", flush=True)
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        **_ENVIRONMENT,
        "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    code = subprocess.run(arguments, env=environment, check=False).returncode
    if code:
        print(f"demo: this command ended with exit code {code}", file=sys.stderr)
        sys.exit(code)


def summary(records: Path, run: Path, model: Path, picture: Path, seconds: float) -> str:
    """Say what came out, from the files that the stages wrote."""
    manifest = json.loads((records / "manifest.json").read_text(encoding="utf-8"))
    totals = manifest["totals"]
    metrics = read_metrics(run)
    training = [line for line in metrics if "train/loss" in line]
    last = [line for line in metrics if "eval/learned" in line][-1]
    speeds = sorted(line["train/tokens_per_second"] for line in training)
    rejected = ", ".join(
        f"{count['records']:,} {reason.replace('_', ' ')}"
        for reason, count in totals["not_kept"].items()
        if count["records"]
    )
    return f"""
== Summary
records    {totals["kept"]["records"]:,} made of {totals["read"]["records"]:,} read \
({totals["kept"]["residues"]:,} residues); not kept: {rejected or "none"}
held out   {totals["splits"]["holdout"]["records"]:,} records that training never sees
trained    {training[-1]["step"]:.0f} steps, {training[-1]["train/tokens"]:,.0f} tokens, \
stopped and resumed once at step {STOP_AT_STEP}
speed      {speeds[len(speeds) // 2]:,.0f} tokens/s on {RANKS} ranks (median, without padding)
learned    {last["eval/learned"]:.2f} ± {last["eval/learned_se"]:.2f} nats a residue: \
held-out loss {last["eval/loss"]:.2f},
           on the same proteins with their residues shuffled {last["eval/loss_shuffled"]:.2f}
files      records {records}
           run     {run}  (metrics.jsonl, checkpoints/, tensorboard/)
           model   {model}  (transformers.BertForMaskedLM.from_pretrained)
           curve   {picture}
time       {seconds:.0f} s"""


if __name__ == "__main__":
    main()
