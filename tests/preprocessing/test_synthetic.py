import gzip
import hashlib
import re
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from Bio import SeqIO
from Bio.Align import PairwiseAligner, substitution_matrices

from preprocessing.errors import InputError
from preprocessing.homologs import MAX_LENGTH
from preprocessing.synthetic import SynthesisOptions, SynthesisSummary, synthesize
from preprocessing.truth import GO_VOCABULARY

HEADER = re.compile(
    r">(UniRef50_(A0A[A-Z0-9]{2}\d[A-Z][A-Z0-9]{2}\d)) \S.* n=[1-9]\d* "
    r"Tax=[A-Z][a-z]+ [a-z]+ TaxID=\d+ RepID=\2_[A-Z0-9]{3,5}"
)
GOLDEN = {
    "main.fasta": "0143ce3d7c95c1dd",
    "hidden.fasta": "f74371ad7ff67e68",
    "truth.tsv": "3eb3736cf5bf7558",
    "go.tsv": "348233c3b6f24b4c",
}
PLAIN = {"duplicate_rate": 0.0, "rare_rate": 0.0, "lowercase_rate": 0.0}


class Corpus:
    """A synthesized corpus, read back by Biopython."""

    def __init__(self, folder: Path, **options) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        hidden = folder / "hidden.fasta" if options.get("hidden_families") else None
        self.summary = synthesize(
            folder / "main.fasta",
            SynthesisOptions(**options),
            hidden_output=hidden,
            truth=folder / "truth.tsv",
            go_terms=folder / "go.tsv",
        )
        self.main = self._sequences(folder / "main.fasta")
        self.hidden = self._sequences(hidden) if hidden else {}
        header, *rows = (folder / "truth.tsv").read_text().splitlines()
        assert header == "id\tfamily\tidentity\thidden"
        table = [row.split("\t") for row in rows]
        self.family = {identifier: int(family) for identifier, family, _, _ in table}
        self.identity = {identifier: float(identity) for identifier, _, identity, _ in table}
        self.is_hidden = {identifier: hidden == "1" for identifier, _, _, hidden in table}
        lines = (folder / "go.tsv").read_text().splitlines()
        self.go_terms = {i: terms.split(";") for i, terms in (line.split("\t") for line in lines)}

    @staticmethod
    def _sequences(path: Path) -> dict[str, str]:
        records = list(SeqIO.parse(path, "fasta"))
        sequences = {record.id: str(record.seq) for record in records}
        assert len(sequences) == len(records), "ids recur"
        return sequences

    def by_family(self, sequences: dict[str, str]) -> dict[int, list[str]]:
        families = defaultdict(list)
        for identifier in sequences:
            families[self.family[identifier]].append(identifier)
        return families


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """2,000 records of 40 families, and 6 hidden families; default rates."""
    folder = tmp_path_factory.mktemp("corpus")
    return Corpus(folder, records=2000, hidden_families=6, seed=1)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in folder.iterdir()
    }


def kmers(sequence: str, k: int) -> set[str]:
    return {sequence[i : i + k] for i in range(len(sequence) - k + 1)}


def aligned_identity(first: str, second: str) -> float:
    """Identical columns over columns of a global alignment."""
    aligner = PairwiseAligner(
        substitution_matrix=substitution_matrices.load("BLOSUM62"),
        open_gap_score=-11,
        extend_gap_score=-1,
    )
    alignment = aligner.align(first, second)[0]
    counts = alignment.counts()
    return counts.identities / alignment.length


def test_every_line_is_a_uniref_header_or_at_most_60_residues(corpus):
    lines = (corpus.folder / "main.fasta").read_text().splitlines()
    for is_header, group in groupby(lines, key=lambda line: line.startswith(">")):
        block = list(group)
        if is_header:
            assert len(block) == 1
            assert HEADER.fullmatch(block[0])
        else:
            assert all(re.fullmatch("[A-Za-z]{60}", line) for line in block[:-1])
            assert re.fullmatch("[A-Za-z]{1,60}", block[-1])


def test_summary_counts_what_a_parser_finds(corpus):
    repeated = sum(
        len(ids) - len({corpus.main[i] for i in ids})
        for ids in corpus.by_family(corpus.main).values()
    )
    assert corpus.summary == SynthesisSummary(
        records=len(corpus.main),
        residues=sum(map(len, corpus.main.values())),
        bytes=(corpus.folder / "main.fasta").stat().st_size,
        families=len(set(map(corpus.family.get, corpus.main))),
        duplicates=repeated,
        annotated=len(corpus.go_terms),
        hidden_records=len(corpus.hidden),
        hidden_families=len(set(map(corpus.family.get, corpus.hidden))),
    )
    assert corpus.summary.records == 2000
    assert corpus.summary.families == 40
    assert corpus.summary.hidden_families == 6


def test_bytes_are_those_of_every_other_machine_and_numpy(tmp_path):
    """The digests are the promise; they change only when the text is meant to change."""
    Corpus(tmp_path, records=300, hidden_families=2, seed=42)
    assert digests(tmp_path) == GOLDEN


def test_same_options_same_bytes_and_another_seed_others(tmp_path):
    first = digests(Corpus(tmp_path / "a", size_bytes=100_000, seed=5).folder)
    assert digests(Corpus(tmp_path / "b", size_bytes=100_000, seed=5).folder) == first
    other = digests(Corpus(tmp_path / "c", size_bytes=100_000, seed=6).folder)
    assert all(other[name] != first[name] for name in first)


def test_side_outputs_do_not_change_the_main_fasta(corpus, tmp_path):
    synthesize(tmp_path / "main.fasta", SynthesisOptions(records=2000, seed=1))
    assert (tmp_path / "main.fasta").read_bytes() == (corpus.folder / "main.fasta").read_bytes()


@pytest.mark.parametrize("size", [1, 20_000, 3_000_000])
@pytest.mark.parametrize("families", [None, 1])
def test_size_is_reached_by_the_last_record(tmp_path, size, families):
    output = tmp_path / "main.fasta"
    summary = synthesize(output, SynthesisOptions(size_bytes=size, families=families))
    text = output.read_text()
    assert summary.bytes == len(text) >= size
    assert len(text[: text.rindex("\n>") + 1 if summary.records > 1 else 0]) < size


@pytest.mark.parametrize("records", [1, 7, 1_500])
def test_records_are_exact(tmp_path, records):
    output = tmp_path / "main.fasta"
    assert synthesize(output, SynthesisOptions(records=records)).records == records
    assert output.read_text().count(">") == records


@pytest.mark.parametrize("goal", [{"records": 1200}, {"size_bytes": 400_000}])
@pytest.mark.parametrize("families", [1, 64, 1100])
def test_families_are_as_many_as_asked_for(tmp_path, goal, families):
    if families > 1000:  # a second block of families
        goal = {name: 2 * amount for name, amount in goal.items()}
    corpus = Corpus(tmp_path, families=families, median_length=100, **goal)
    assert corpus.summary.families == families
    assert set(corpus.family.values()) == set(range(families))


def test_families_follow_one_another_and_their_sizes_vary_as_zipf_says(tmp_path):
    corpus = Corpus(tmp_path, records=6000, families=30, median_length=50)
    order = [corpus.family[identifier] for identifier in corpus.main]
    assert order == sorted(order)
    sizes = sorted(Counter(order).values(), reverse=True)
    assert sizes[0] / sizes[1] == pytest.approx(2, rel=0.05)
    assert sizes[0] / sizes[9] == pytest.approx(10, rel=0.1)
    # The order is no order of size.
    assert [size for _, size in sorted(Counter(order).items())][:-1] != sizes[1:]


def test_no_sequence_is_longer_than_the_cap(tmp_path):
    corpus = Corpus(tmp_path, records=30, families=30, median_length=MAX_LENGTH)
    lengths = list(map(len, corpus.main.values()))
    assert max(lengths) == MAX_LENGTH
    assert lengths.count(MAX_LENGTH) > 3


def test_members_of_a_family_align_and_others_do_not(tmp_path):
    corpus = Corpus(tmp_path, records=60, families=10, min_identity=0.6, max_identity=0.9, **PLAIN)
    families = corpus.by_family(corpus.main)
    differences = []
    for family, ids in families.items():
        stranger = families[(family + 1) % 10][0]
        assert aligned_identity(corpus.main[ids[0]], corpus.main[stranger]) < 0.33
        for first, second in pairwise(ids):
            if len(corpus.main[first]) > 100:
                found = aligned_identity(corpus.main[first], corpus.main[second])
                # Changes away from one ancestor are independent in both.
                expected = corpus.identity[first] * corpus.identity[second]
                assert found == pytest.approx(expected, abs=0.12)
                differences.append(found - expected)
    assert len(differences) > 15
    assert statistics.mean(differences) == pytest.approx(0.01, abs=0.03)


def test_hidden_families_are_like_nothing_in_the_main_fasta(corpus):
    main_words = set().union(*(kmers(sequence.upper(), 9) for sequence in corpus.main.values()))
    hidden_words = set().union(*(kmers(sequence.upper(), 9) for sequence in corpus.hidden.values()))
    assert len(main_words & hidden_words) < 1e-4 * len(hidden_words)
    # While members of a family share words with the one that is most like their ancestor.
    for ids in corpus.by_family(corpus.hidden).values():
        nearest, *others = sorted(ids, key=corpus.identity.__getitem__, reverse=True)
        words = kmers(corpus.hidden[nearest].upper(), 6)
        related = sum(bool(words & kmers(corpus.hidden[i].upper(), 6)) for i in others)
        assert related > 0.8 * len(others)
    main_families = {corpus.family[identifier] for identifier in corpus.main}
    hidden_families = {corpus.family[identifier] for identifier in corpus.hidden}
    assert not main_families & hidden_families
    assert not set(corpus.main) & set(corpus.hidden)


def test_truth_lists_every_record_in_order(corpus):
    assert list(corpus.family) == [*corpus.main, *corpus.hidden]
    assert [i for i, hidden in corpus.is_hidden.items() if hidden] == list(corpus.hidden)


def test_go_terms_depend_on_the_family_alone(corpus):
    terms_of = defaultdict(set)
    for identifier, terms in corpus.go_terms.items():
        assert 1 <= len(terms) == len(set(terms)) <= 6
        assert all(re.fullmatch(r"GO:0\d{6}", term) for term in terms)
        terms_of[corpus.family[identifier]].add(tuple(terms))
    assert all(len(variants) == 1 for variants in terms_of.values())
    assert len({variant for variants in terms_of.values() for variant in variants}) > 30
    uses = Counter(term for variants in terms_of.values() for term in next(iter(variants)))
    assert uses.most_common(10)[-1][1] > 1, "no terms are shared among families"
    assert list(uses.values()).count(1) > 10, "no terms are a family's own"


def test_hidden_families_have_shared_terms_and_terms_of_their_own(corpus):
    main = {t for i, terms in corpus.go_terms.items() if i in corpus.main for t in terms}
    hidden = {t for i, terms in corpus.go_terms.items() if i in corpus.hidden for t in terms}
    assert main & hidden
    assert hidden - main
    assert all(int(term[3:]) <= GO_VOCABULARY for term in main)
    assert any(int(term[3:]) > GO_VOCABULARY for term in hidden)


def test_annotated_rate_is_met(corpus, tmp_path):
    assert len(corpus.go_terms) / (2000 + len(corpus.hidden)) == pytest.approx(0.45, abs=0.04)
    assert len(Corpus(tmp_path, records=50, annotated_rate=1.0).go_terms) == 50


def test_duplicates_stand_under_other_ids_in_their_family(tmp_path):
    corpus = Corpus(tmp_path, records=4000, duplicate_rate=0.05)
    ids_of = defaultdict(list)
    for identifier, sequence in corpus.main.items():
        ids_of[sequence].append(identifier)
    extra = len(corpus.main) - len(ids_of)
    assert extra / 4000 == pytest.approx(0.05, abs=0.01)
    assert extra == corpus.summary.duplicates
    assert all(len(set(map(corpus.family.get, ids))) == 1 for ids in ids_of.values())


def test_outputs_are_gzipped_where_their_names_say_so(tmp_path):
    options = SynthesisOptions(records=100)
    synthesize(tmp_path / "a.fasta.gz", options, truth=tmp_path / "a.tsv.gz")
    synthesize(tmp_path / "b.fasta", options, truth=tmp_path / "b.tsv")
    for packed, plain in (("a.fasta.gz", "b.fasta"), ("a.tsv.gz", "b.tsv")):
        unpacked = gzip.decompress((tmp_path / packed).read_bytes())
        assert unpacked == (tmp_path / plain).read_bytes()


def test_existing_files_are_kept_unless_told_otherwise(tmp_path):
    output, truth = tmp_path / "main.fasta", tmp_path / "truth.tsv"
    truth.write_text("mine")
    with pytest.raises(InputError, match=r"truth\.tsv exists: .* --overwrite"):
        synthesize(output, SynthesisOptions(records=1), truth=truth)
    assert list(tmp_path.iterdir()) == [truth]
    assert truth.read_text() == "mine"
    synthesize(output, SynthesisOptions(records=1), truth=truth, overwrite=True)
    assert truth.read_text().startswith("id\t")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_size(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; "
        "from preprocessing.synthetic import SynthesisOptions, synthesize; "
        "synthesize(Path(sys.argv[1]), SynthesisOptions(size_bytes=int(sys.argv[2]))); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, str(tmp_path / f"{size}.fasta"), str(size)],
                capture_output=True,
                text=True,
                check=True,
                cwd=Path(__file__).parents[2],
            ).stdout
        )
        for size in (20_000_000, 160_000_000)
    ]
    assert peaks[1] - peaks[0] < 20  # MiB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either --size or --records, not both"),
        ({"records": 5, "size_bytes": 5}, "either --size or --records, not both"),
        ({"records": 0}, "--records 0 must be at least 1"),
        ({"size_bytes": 0}, "--size 0 must be at least 1"),
        ({"records": 10**10}, "more than there are ids for"),
        ({"records": 5, "seed": -1}, "--seed -1"),
        ({"records": 5, "families": 0}, "--families 0"),
        ({"records": 5, "families": 6}, "--families 6 do not fit into about 5 records"),
        ({"size_bytes": 5000, "families": 50}, "--families 50 do not fit"),
        ({"records": 5, "median_length": 10}, "--median-length 10 must be at least 11"),
        (
            {"records": 5, "min_identity": 0.9, "max_identity": 0.8},
            r"--min-identity 0\.9 is above --max-identity 0\.8",
        ),
        ({"records": 5, "duplicate_rate": 1.5}, r"duplicate_rate 1\.5 .* at most 1"),
        ({"records": 5, "rare_rate": float("nan")}, "rare_rate nan"),
        ({"records": 5, "hidden_families": -1}, "--hidden-families -1"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        SynthesisOptions(**options)


def test_hidden_families_and_their_output_go_together(tmp_path):
    with pytest.raises(InputError, match="--hidden-families is given without --hidden-output"):
        synthesize(tmp_path / "a", SynthesisOptions(records=9, hidden_families=2))
    with pytest.raises(InputError, match="--hidden-output is given without --hidden-families"):
        synthesize(tmp_path / "a", SynthesisOptions(records=9), hidden_output=tmp_path / "b")


def test_families_that_do_not_all_fit_are_an_error_and_leave_nothing(tmp_path):
    options = SynthesisOptions(size_bytes=40_000, families=89)
    with pytest.raises(InputError, match=r"--size 40000 was full after \d+ of --families 89"):
        synthesize(tmp_path / "main.fasta", options)
    assert not list(tmp_path.iterdir())
