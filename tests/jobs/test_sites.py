"""Site profiles: every fact has a source, users inherit, and what cannot be meant is refused."""

from pathlib import Path

import pytest

from jobs.site import built_in, load_profile
from preprocessing.errors import InputError


@pytest.mark.parametrize("name", built_in())
def test_every_fact_of_a_profile_has_its_source(name: str) -> None:
    facts = list(load_profile(name).facts())
    assert facts
    for fact, _, source in facts:
        assert source, fact
        assert not source.endswith(".toml"), fact


def test_the_profiles_are_those_that_the_documents_name() -> None:
    assert built_in() == [
        *("frontier", "generic-lsf", "generic-slurm", "local", "perlmutter", "rhea", "summit"),
    ]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


MINE = """
title = "our cluster"
inherits = "rhea"
[node]
cores = 24
[sources]
"node.cores" = "lscpu"
"""


def test_an_own_profile_inherits_and_keeps_the_sources_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = write(tmp_path / "prothpc" / "sites" / "ours.toml", MINE + 'queue = "our guide"\n')
    profile = load_profile("ours")
    facts = {name: (value, source) for name, value, source in profile.facts()}
    assert profile.site.node.cores == 24
    assert profile.site.submit.project == "required"
    assert facts["node.cores"] == ("24", "lscpu")
    assert facts["submit.project"] == ('"required"', "OLCF Rhea User Guide (olcf-user-docs, 2020)")
    assert load_profile(str(file)).site == profile.site


def test_a_fact_of_ones_own_does_not_borrow_the_inherited_source(tmp_path: Path) -> None:
    text = MINE.replace("[sources]\n", "").replace('"node.cores" = "lscpu"\n', "gpus = 2\n")
    file = write(tmp_path / "ours.toml", text)
    facts = {name: source for name, _, source in load_profile(str(file)).facts()}
    assert facts["node.cores"] == facts["node.gpus"] == str(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('inherits = "rhea"', ""), "say what it begins with"),
        (('"rhea"', '"cray"'), "choose one of frontier"),
        (("cores = 24", "core = 24"), "did you mean cores?"),
        (("cores = 24", 'cores = "all"'), "must be a whole number"),
        (("[node]", '[launch]\nmpi = "srun -n {tasks}"\n[node]'), "{tasks} is none of {nodes}"),
        (
            ("[node]", '[queues.batch]\nbins = [{ nodes = 1, time = "2h" }]\n[node]'),
            "2h is no time",
        ),
        (("[node]", '[environment]\n"A B" = "c"\n[node]'), "is no name of a variable"),
        (("[node]", "node"), "cannot be read as TOML"),
        (("[node]", "modules = [1]\n[node]"), "must be a list of strings"),
    ],
)
def test_a_profile_that_cannot_be_meant_is_refused(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    file = write(tmp_path / "ours.toml", MINE.replace(*change))
    with pytest.raises(InputError) as refusal:
        load_profile(str(file))
    assert message in str(refusal.value)
    assert "ours.toml" in str(refusal.value)


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(InputError, match="did you mean perlmutter"):
        load_profile("perlmuter")
    with pytest.raises(InputError, match="no such file"):
        load_profile("./perlmutter.toml")
