"""Rendered scripts: as the golden files show them, clean, and with every value in its place."""

import dataclasses
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import GOLDEN, WORK, every_combination, golden, request, text_of, variants
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jobs.quoting import only_text
from preprocessing.errors import InputError

NASTY = "a $`\"'\\;&|<>(){}[]*?!#~%\n\t\0=-\u2013\u2014\u2212\u00a0\u200b\u202eé中.,:/@^"
texts = st.text(st.sampled_from(NASTY), max_size=12) | st.text(max_size=6)


@pytest.mark.parametrize("name", golden())
def test_scripts_are_those_of_the_golden_files(name: str) -> None:
    """After an intended change: python tests/jobs/cases.py, and look at what git says."""
    assert text_of(golden()[name]) == (GOLDEN / f"{name}.sh").read_text()


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(golden())


def test_shellcheck_finds_nothing_in_any_script(
    tmp_path: Path, need: Callable[[str], None]
) -> None:
    need("shellcheck")
    for name, case in {**every_combination(), **variants()}.items():
        (tmp_path / f"{name}.sh").write_text(text_of(case))
    scripts = sorted(map(str, tmp_path.iterdir()))
    assert len(scripts) == 7 * 4 + 15
    found = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert found.stdout == ""
    assert found.returncode == 0


def test_a_value_that_nobody_quoted_does_not_get_into_a_script() -> None:
    with pytest.raises(TypeError, match="not quoted"):
        only_text("harmless")


PRINT = """
cd() { printf '%s\\0' "$1"; }
eval "$(grep -E '^cd ' <<< "$1")"
eval "$(grep -E '^job_dir=' <<< "$1")"
eval "$(grep -E '^command=' <<< "$1")"
printf '%s\\0' "$job_dir" "${command[@]}"
"""


def values_in_bash(script: str, folder: Path) -> list[str]:
    """What bash makes of the words in a script."""
    done = subprocess.run(
        ["bash", "-c", PRINT, "bash", script], cwd=folder, capture_output=True, check=True
    )
    assert os.listdir(folder) == []
    return done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1]


@settings(max_examples=150, deadline=None)
@given(
    arguments=st.lists(texts, max_size=3),
    directory=texts,
    project=texts,
    queue=texts,
    site=st.sampled_from(["generic-slurm", "generic-lsf"]),
)
@example(["$(touch pwned)", "`touch pwned`"], "a'; touch pwned; '", "p", "q", "generic-slurm")
@example(["a\n#SBATCH --nodes=99"], "run", "p", "q", "generic-slurm")
@example(["x"], "run", "p\n#BSUB -n 99", "q", "generic-lsf")
@example(["\u2013nodes"], "run", "p q", "-q", "generic-lsf")
def test_nothing_that_is_typed_breaks_out_of_its_place(
    tmp_path_factory: pytest.TempPathFactory,
    arguments: list[str],
    directory: str,
    project: str,
    queue: str,
    site: str,
) -> None:
    plain = text_of(request(site, "train", arguments=("x",), project="p", queue="q"))
    changed = request(
        site,
        "train",
        arguments=tuple(arguments),
        directory=Path(directory),
        project=project,
        queue=queue,
    )
    try:
        script = text_of(changed)
    except InputError:
        return  # refused
    # The same lines, directives that differ in values only, and words that are what was typed.
    assert len(script.splitlines()) - len(plain.splitlines()) in (0, -1, -2)
    marks = ("#SBATCH", "#BSUB")
    for line in script.splitlines():
        if line.startswith(marks) and line not in plain:
            assert line.endswith((project, queue)) or "0001-train" in line
    folder = tmp_path_factory.mktemp("empty")
    job_dir = WORK / changed.stage.jobs_directory(Path(directory)) / "0001-train"
    assert values_in_bash(script, folder) == [
        *(str(WORK), str(job_dir), "prothpc", "train"),
        *arguments,
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"project": "ABC 123"}, "--project 'ABC 123' cannot stand"),
        ({"queue": "-q"}, "--queue '-q' cannot stand"),
        ({"directory": Path("runs/my first")}, "the directory of the job"),
        ({"arguments": ("a\nb",)}, "LINE FEED|character number 10"),
        ({"arguments": ("a\u00a0b",)}, "NO-BREAK SPACE"),
        ({"arguments": ("\u2014resume",)}, "EM DASH"),
    ],
)
def test_what_cannot_be_quoted_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        text_of(request("generic-slurm", "train", **changes))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("srun $(id)", "nothing else that a shell would expand"),
        ("srun `id`", "nothing else that a shell would expand"),
        ('srun "x', "no closing quotation"),
    ],
)
def test_a_profile_cannot_smuggle_commands_into_the_launch_line(line: str, message: str) -> None:
    case = request("generic-slurm", "train")
    launch = dataclasses.replace(case.profile.site.launch, torch=line)
    profile = dataclasses.replace(
        case.profile, site=dataclasses.replace(case.profile.site, launch=launch)
    )
    with pytest.raises(InputError, match=message):
        text_of(dataclasses.replace(case, profile=profile))


def test_metacharacters_of_a_launch_line_are_words(tmp_path: Path) -> None:
    case = request("generic-slurm", "train")
    launch = dataclasses.replace(case.profile.site.launch, torch="srun ; $HOME/x 'a b' && *")
    profile = dataclasses.replace(
        case.profile, site=dataclasses.replace(case.profile.site, launch=launch)
    )
    script = text_of(dataclasses.replace(case, profile=profile))
    assert """run srun ';' "$HOME/x" 'a b' '&&' '*' "${command[@]}\"""" in script
