"""Every command that the README shows is run, in its order, as it stands there."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)


def test_the_two_commands_are_what_ci_runs() -> None:
    assert blocks()[0].split("\n") == ["make demo", "make test", ""]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in blocks()[0].split("\n"):
        assert command in ci


@pytest.mark.slow
def test_the_way_from_own_fasta_to_a_model_works_as_shown(
    tmp_path: Path,
    prothpc: Callable[..., subprocess.CompletedProcess[str]],
    rank_environment: dict[str, str],
) -> None:
    fasta = tmp_path / "my.fasta.gz"
    made = prothpc("synthesize", fasta, "--records", "1500", "--median-length", "40")
    assert made.returncode == 0, made.stderr
    script = "set -euo pipefail\n" + "\n".join(blocks()[1:])
    # The README's reader stands in a checkout whose .venv holds prothpc; so do these commands.
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=rank_environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "my-model" / "model.safetensors").is_file()
    assert (tmp_path / "families.tsv").is_file()


def test_documents_that_the_readme_names_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
