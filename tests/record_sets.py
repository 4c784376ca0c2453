"""What tests of record generation share: making record sets on ranks, and looking into them."""

from pathlib import Path

from Bio.SeqIO.FastaIO import SimpleFastaParser

from preprocessing.records import RecordSet


def content(directory: Path) -> dict[str, bytes]:
    """Everything in a finished record set but run.json."""
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    del files["run.json"]
    return files


def sequences(directory: Path, split: str = "train") -> dict[str, str]:
    """Sequences and their ids."""
    records = RecordSet(directory, split)
    found = (records.record(number) for number in range(len(records)))
    return {record.sequence: record.id for record in found}


def smallest_ids(path: Path) -> dict[str, str]:
    """Sequences of a FASTA file and the smallest of each one's ids, as Biopython reads them."""
    found: dict[str, str] = {}
    with path.open() as file:
        for title, sequence in SimpleFastaParser(file):
            name = title.split()[0]
            found[sequence] = min(name, found.get(sequence, name))
    return found


DRIVER = """
import json, sys
from pathlib import Path
from preprocessing.errors import InputError
from preprocessing.generate import generate
from preprocessing.options import PreprocessOptions
from preprocessing.parallel import connect

ranks = connect(int(sys.argv[1]))
for inputs, output, options, unit_bytes in json.loads(sys.argv[2]):
    options["exclude"] = tuple(map(Path, options.get("exclude", ())))
    for name in ("holdout_by", "spill"):
        if options.get(name):
            options[name] = Path(options[name])
    try:
        generate([Path(path) for path in inputs], Path(output), PreprocessOptions(**options),
                 ranks, unit_bytes=unit_bytes)
        print(f"rank {ranks.rank}: done\\n", end="", flush=True)
    except InputError as error:
        print(f"rank {ranks.rank}: {error}\\n", end="", flush=True)
"""
"""Program of a rank: makes record sets from its arguments, ranks and JSON jobs (inputs, output,
options, unit bytes)."""
