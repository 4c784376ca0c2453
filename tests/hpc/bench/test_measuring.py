"""A measured command's time, memory and output are kept, and never mixed with other machines'."""

import json
import sys
from pathlib import Path

import pytest

from hpc.bench.measuring import Case, Results, measure, read_results, run_rounds
from preprocessing.errors import InputError

ABOUT = {"machine": {"cores": 2}, "size": 10}


def program(text: str, **about: object) -> Case:
    command = [sys.executable, "-c", text]
    return Case(part="part", name="case", command=command, **about)  # type: ignore[arg-type]


def test_time_and_cpu_time_of_a_process() -> None:
    busy = "import time; end = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    sample = measure(program(busy))
    assert sample["seconds"] >= 0.2
    assert sample["cpu_seconds"] >= 0.2
    idle = measure(program("import time; time.sleep(0.5)"))
    assert idle["seconds"] >= 0.5
    assert idle["cpu_seconds"] < 0.5


def test_a_case_that_reports_times_itself() -> None:
    sample = measure(
        program("print('noise'); print('{\"seconds\": 0.25, \"records\": 7}')", reports=True)
    )
    assert (sample["seconds"], sample["records"]) == (0.25, 7)
    assert sample["whole_seconds"] != 0.25


def test_peak_of_anonymous_memory() -> None:
    holding = "import time; held = b'x' * 200_000_000; time.sleep(0.3); del held; time.sleep(0.1)"
    peak = measure(program(holding, watch_memory=True))["peak_anonymous"]
    assert 200_000_000 < peak < 260_000_000


def test_what_is_written_is_measured_and_removed(tmp_path: Path) -> None:
    made = tmp_path / "made"
    text = (
        f"import os; os.mkdir({str(made)!r}); open({str(made / 'a')!r}, 'wb').write(bytes(100_000))"
    )
    for _ in range(2):  # the second run must not find what the first made
        assert 100_000 <= measure(program(text, makes=made))["written"] < 110_000
        assert not made.exists()
    measure(program(text, makes=made, keeps=True))
    assert made.exists()


def test_a_failure_names_the_case_and_what_it_said() -> None:
    with pytest.raises(InputError, match=r"part, case: failed with code 3:(.|\n)*no such luck"):
        measure(program("import sys; print('no such luck', file=sys.stderr); sys.exit(3)"))


def test_rounds_alternate_and_samples_are_added_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results" / "r.json"
    cases = [
        Case(part="p", name=name, command=[sys.executable, "-c", ""]) for name in ("a", "b", "c")
    ]
    run_rounds(cases, Results(path, ABOUT, "abc"), rounds=2)
    assert [sample["case"] for sample in read_results(path)["samples"]] == list("abccba")
    run_rounds(cases[:1], Results(path, ABOUT, "abc"), rounds=1)
    content = json.loads(path.read_bytes())
    assert [sample["case"] for sample in content["samples"]] == list("abccbaa")
    assert content["machine"] == {"cores": 2}
    assert len(content["commands"]) == 1


@pytest.mark.parametrize("change", [{"machine": {"cores": 4}}, {"size": 11}])
def test_samples_of_something_else_are_not_mixed(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "r.json"
    case = Case(part="p", name="a", command=[sys.executable, "-c", ""])
    run_rounds([case], Results(path, ABOUT, "abc"), rounds=1)
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"another {next(iter(change))}.*choose another --output"):
        Results(path, {**ABOUT, **change}, "abc")
    assert path.read_bytes() == before


def test_a_part_is_of_one_commit(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    case = Case(part="p", name="a", command=[sys.executable, "-c", ""])
    run_rounds([case], Results(path, ABOUT, "abc"), rounds=1)
    later = Results(path, ABOUT, "abd")
    later.check_part("q")
    with pytest.raises(InputError, match="part p was measured at commit abc, this is abd"):
        later.check_part("p")


@pytest.mark.parametrize("content", ["", "[]", "{}", "\xff"])
def test_a_file_that_holds_no_results_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match="not a file of 'prothpc bench'"):
        Results(path, ABOUT, "abc")
