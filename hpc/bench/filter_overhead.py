"""What `prothpc filter` costs beside its program, started by hand on the same files.

    python -m hpc.bench.filter_overhead blastp|mmseqs2 QUERIES.fasta TARGETS.fasta WORK [ROUNDS]

Both take turns; one chunk, one thread. By hand means the commands that give a table of the same
columns, with the same limits on hits.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from hpc.bench.measuring import Case, Results, describe_commit, describe_machine, run_rounds
from preprocessing.filtering.tools import Mmseqs

COLUMNS = "query,target,nident,alnlen,qstart,qend,tstart,tend,qlen,tlen,evalue"
BLAST_COLUMNS = "6 qseqid sseqid nident length qstart qend sstart send qlen slen evalue"
BY_HAND = {
    "blastp": (
        "mkdir {out} && makeblastdb -in {targets} -dbtype prot -out {out}/db && "
        f"blastp -query {{queries}} -db {{out}}/db -evalue 0.001 -outfmt '{BLAST_COLUMNS}' "
        "-out {out}/hits.tsv"
    ),
    "mmseqs2": (
        "mkdir {out} && mmseqs easy-search {queries} {targets} {out}/hits.tsv {out}/tmp "
        f"-s 7.5 -e 0.001 -a 1 --alignment-mode 3 --max-seqs {Mmseqs.first_limit} --threads 1 "
        f"--format-output {COLUMNS}"
    ),
}


def main() -> None:
    """Measure, and print the ratios of CPU and wall-clock time of all pairs."""
    tool, queries, targets, work = sys.argv[1], *map(Path, sys.argv[2:5])
    work.mkdir(parents=True, exist_ok=True)
    rounds = int(sys.argv[5]) if len(sys.argv) > 5 else 5
    about = {"machine": describe_machine()}
    results = Results(work / f"{tool}.json", about, describe_commit())
    by_hand = BY_HAND[tool].format(queries=queries, targets=targets, out=work / "by-hand")
    ours: list[str | Path] = [
        sys.executable, "-m", "hpc.cli", "filter", "--queries", queries, "--targets", targets,
        "--tool", tool, "--min-identity", "0.4", "--chunks", "1", "--threads", "1",
        "--output", work / "ours", *(["--sensitivity", "7.5"] if tool == "mmseqs2" else []),
    ]  # fmt: skip
    cases = [
        Case(part=tool, name="by hand", command=["sh", "-c", by_hand], makes=work / "by-hand"),
        Case(part=tool, name="prothpc filter", command=ours, makes=work / "ours"),
    ]
    run_rounds(cases, results, rounds)
    for what in ("cpu_seconds", "seconds"):
        samples = {
            case.name: [s[what] for s in results.content["samples"] if s["case"] == case.name]
            for case in cases
        }
        ratios = [b / a for a, b in zip(samples["by hand"], samples["prothpc filter"], strict=True)]
        print(
            f"{tool}, {what}: by hand {statistics.median(samples['by hand']):.1f}; ratio "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
