"""Whatever a FASTA file looks like: the same records as Biopython reads, and the same bytes for any
units, ranks and order of files."""

import gzip
import io
import pickle
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from Bio.SeqIO.FastaIO import SimpleFastaParser
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from record_sets import content

from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.parallel import SerialDealer
from preprocessing.records import RecordSet

EXAMPLE_SECONDS = 30
LONG_RECORD = 1500


class Hang(BaseException):
    """An example that does not end; no Exception, so that Hypothesis does not repeat it."""


@contextmanager
def in_time() -> Iterator[None]:
    """Raise where an example takes so long that it must be a hang."""

    def stop(*_: Any) -> None:
        raise Hang(f"not done after {EXAMPLE_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(EXAMPLE_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class ThreadRanks:
    """A rank that is a thread."""

    def __init__(self, rank: int, size: int, shared: dict[str, Any]) -> None:
        self.rank, self.size, self._shared = rank, size, shared

    def barrier(self) -> None:
        self._shared["barrier"].wait(EXAMPLE_SECONDS)

    rest = barrier

    def allgather(self, value: Any) -> list[Any]:
        self._shared[self.rank] = pickle.dumps(value)  # as MPI does: each rank has its own copy
        self.barrier()
        values = [pickle.loads(self._shared[rank]) for rank in range(self.size)]
        self.barrier()
        return values

    def bcast(self, value: Any) -> Any:
        return self.allgather(value)[0]

    @contextmanager
    def dealer(self) -> Iterator[Any]:
        if self.rank == 0:
            self._shared["dealer"] = LockedDealer()
        self.barrier()
        yield self._shared["dealer"]
        self.barrier()


class LockedDealer(SerialDealer):
    """A dealer for threads."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def next(self) -> int:
        with self._lock:
            return super().next()


def generate_in_threads(size: int, *arguments: Any, **keywords: Any) -> None:
    shared: dict[str, Any] = {"barrier": threading.Barrier(size)}
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            generate(*arguments, ThreadRanks(rank, size, shared), **keywords)  # type: ignore[arg-type]
        except BaseException as error:
            errors.append(error)
            shared["barrier"].abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


residues = st.text("ACDEFGHIKLMNPQRSTVWYBJOUXZ", min_size=1, max_size=30)
sequences = residues | st.builds(
    lambda part, length: (part * length)[:length], residues, st.integers(100, LONG_RECORD)
)


@st.composite
def fasta(draw: st.DrawFn) -> bytes:
    """A file of 1 to 40 records in one of the ways in which people write them."""
    end = draw(st.sampled_from(["\n", "\r\n"]))
    lines = [""] * draw(st.integers(0, 2))
    for _ in range(draw(st.sampled_from([1, 2, 5, 40]))):
        title = draw(st.text("abc01|_.", min_size=1, max_size=4))
        about = draw(st.sampled_from(["", " a protein", "\tn=1", " >x [b]", "  "]))
        text = draw(st.sampled_from([str.upper, str.lower, str.title]))(draw(sequences))
        text += draw(st.sampled_from(["", "", "*", "**"]))
        width = draw(st.sampled_from([1, 7, 60, LONG_RECORD]))
        blanks = draw(st.sampled_from(["", "", " ", "  "]))
        lines.append(f">{title}{about}")
        lines += [text[start : start + width] + blanks for start in range(0, len(text), width)]
        lines += [""] * draw(st.sampled_from([0, 0, 1, 2]))
    while lines[-1] == "":
        lines.pop()
    return (end.join(lines) + draw(st.sampled_from(["", end, end * 2]))).encode()


def near_header(text: bytes, number: int, distance: int) -> int:
    """Return a place around the beginning of some record."""
    places = [place for place in range(len(text)) if text.startswith(b"\n>", place)] or [len(text)]
    return max(places[number % len(places)] + 1 + distance, 1)


def biopython(texts: Sequence[bytes]) -> Counter[tuple[str, str]]:
    """Count ids and sequences as Biopython reads them."""
    return Counter(
        (title.split()[0], sequence.upper().rstrip("*"))
        for text in texts
        for title, sequence in SimpleFastaParser(io.StringIO(text.decode(), newline=""))
    )


def ours(directory: Path) -> Counter[tuple[str, str]]:
    """Count ids and sequences of a record set."""
    found: Counter[tuple[str, str]] = Counter()
    for split in ("train", "holdout"):
        records = RecordSet(directory, split)
        for number in range(len(records)):
            record = records.record(number)
            found[record.id, record.sequence] += 1
    return found


# Without Phase.shrink a wrong program fails within seconds; add it to see a small example.
@settings(max_examples=40, deadline=None, phases=[Phase.reuse, Phase.generate])
@given(
    texts=st.lists(fasta(), min_size=1, max_size=3, unique=True),
    zipped=st.booleans(),
    border=st.integers(1, 3 * LONG_RECORD) | st.tuples(st.integers(0, 40), st.integers(-2, 2)),
    size=st.integers(2, 4),
    order=st.randoms(use_true_random=False),
)
def test_same_bytes_for_any_units_ranks_and_order_and_the_records_of_biopython(
    texts: list[bytes], zipped: bool, border: Any, size: int, order: Any
) -> None:
    unit_bytes = border if isinstance(border, int) else near_header(texts[0], *border)
    options = PreprocessOptions(shards=2, holdout=0.3, dedup=False)
    with TemporaryDirectory() as folder, in_time():
        root = Path(folder)
        paths = [root / f"{number}.fasta" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_bytes(gzip.compress(text) if zipped else text)
        generate(paths, root / "whole", options)
        assert ours(root / "whole") == biopython(texts)

        generate(paths, root / "cut", options, unit_bytes=unit_bytes)
        order.shuffle(paths)
        generate_in_threads(size, paths, root / "ranks", options, unit_bytes=unit_bytes)
        cut = content(root / "cut")
        assert content(root / "ranks") == cut
        del cut["manifest.json"]  # blocks of input hashes are as long as a unit
        assert cut == {name: content(root / "whole")[name] for name in cut}
