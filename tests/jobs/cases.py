"""The scripts that golden files show: `python tests/jobs/cases.py` writes them anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

from jobs import render as rendering
from jobs.request import Request
from jobs.site import built_in, load_profile
from jobs.stages import stages

GOLDEN = Path(__file__).parent / "golden"
WORK = Path("/project/abc123/work")

ARGUMENTS = {
    "preprocess": ("uniref50.fasta.gz", "--output", "records"),
    "verify": ("records",),
    "train": ("protbert.toml", "train.run_dir=runs/a"),
    "doctor": ("--dir", "runs"),
}
DIRECTORIES = {"preprocess": "records", "verify": "records", "train": "runs/a", "doctor": "runs"}


def request(site_name: str, stage_name: str, **changes: Any) -> Request:
    """A request that the site takes, with changes."""
    profile = load_profile(site_name)
    local = profile.site.scheduler == "local"
    keywords: dict[str, Any] = {
        "stage": stages()[stage_name],
        "arguments": ARGUMENTS[stage_name],
        "directory": Path(DIRECTORIES[stage_name]),
        "working_directory": WORK,
        "profile": profile,
        "nodes": 1 if local else 2,
        "seconds": None if local else 7200,
        "project": "ABC123" if profile.site.submit.project == "required" else "",
        **changes,
    }
    return Request(**keywords)


def text_of(request: Request) -> str:
    """The script, as it is with one version of prothpc in one place."""
    job_dir = WORK / request.stage.jobs_directory(request.directory) / f"0001-{request.stage.name}"
    with (
        mock.patch.object(rendering.metadata, "version", return_value="1.2.3"),
        mock.patch.object(rendering.sys, "executable", "/project/abc123/env/bin/python"),
    ):
        return rendering.render(request, job_dir)


def every_combination() -> dict[str, Request]:
    """Every stage on every site."""
    return {f"{site}-{stage}": request(site, stage) for site in built_in() for stage in stages()}


def variants() -> dict[str, Request]:
    """What options add to a script."""
    archive, image = Path("/project/prothpc.tar.zst"), Path("/project/prothpc.sif")
    cases = {
        "summit-train-936-racks": request(
            "summit", "train", nodes=936, racks=True, seconds=86400, streams=5616
        ),
        "summit-train-chain": request("summit", "train", chain=3),
        "generic-lsf-train-chain": request("generic-lsf", "train", chain=3),
        "frontier-train-chain": request("frontier", "train", chain=3),
        "frontier-train-staged": request("frontier", "train", records=Path("/project/records")),
        "summit-train-staged": request("summit", "train", records=Path("/project/records")),
        "perlmutter-train-horovod": request("perlmutter", "train", engine="horovod"),
        "summit-train-deepspeed": request("summit", "train", engine="deepspeed"),
        "frontier-train-archive": request("frontier", "train", environment=archive),
        "summit-train-archive": request("summit", "train", environment=archive),
        "perlmutter-train-image": request("perlmutter", "train", environment=image),
        "generic-slurm-train-no-preflight": request("generic-slurm", "train", preflight=False),
    }
    part = dataclasses.replace(
        stages()["preprocess"], name="parts", array=["--part", "{task}/{tasks}"], merge=["--merge"]
    )
    for site in ("generic-slurm", "generic-lsf", "summit"):
        cases[f"{site}-array"] = request(site, "preprocess", stage=part, tasks=10, tasks_at_once=4)
    return cases


def golden() -> dict[str, Request]:
    """The cases whose scripts are kept."""
    kept = ("train", "preprocess")
    every = {name: r for name, r in every_combination().items() if name.endswith(kept)}
    return {**every, **variants()}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("*.sh"):
        old.unlink()
    for name, case in golden().items():
        (GOLDEN / f"{name}.sh").write_text(text_of(case))
