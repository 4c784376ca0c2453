"""Made-up records as they look in UniRef50's FASTA: accessions, headers, lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from preprocessing.homologs import LINE
from preprocessing.philox import RandomStream

PROTEIN_NAMES = (
    "Uncharacterized protein",
    "ABC transporter domain-containing protein",
    "Putative membrane protein",
    "Serine/threonine protein kinase",
    "DNA-directed RNA polymerase subunit beta",
    "Transcriptional regulator, LysR family",
    "ATP synthase subunit alpha",
    "Cytochrome c oxidase subunit 1 (Fragment)",
    "Zinc finger protein",
    "Glycosyltransferase 2-like domain-containing protein",
    "NAD(P)-binding protein",
    "50S ribosomal protein L2",
    "Acyl-CoA dehydrogenase",
    "Histidine kinase",
    "E3 ubiquitin-protein ligase",
    "Aminotransferase class I/II",
)

TAXA = (
    # NCBI taxon name, taxon id, UniProt mnemonic.
    ("Escherichia coli", 562, "ECOLX"),
    ("Homo sapiens", 9606, "HUMAN"),
    ("Mus musculus", 10090, "MOUSE"),
    ("Arabidopsis thaliana", 3702, "ARATH"),
    ("Bacillus subtilis", 1423, "BACIU"),
    ("Drosophila melanogaster", 7227, "DROME"),
    ("Danio rerio", 7955, "DANRE"),
    ("Caenorhabditis elegans", 6239, "CAEEL"),
    ("Zea mays", 4577, "MAIZE"),
    ("Pseudomonas aeruginosa", 287, "PSEAI"),
    ("Staphylococcus aureus", 1280, "STAAU"),
    ("Klebsiella pneumoniae", 573, "KLEPN"),
)

_HEADER_BYTES = 112  # mean length of a header line
_Lengths = TypeVar("_Lengths", int, np.ndarray)

# UniProt accessions of ten characters that begin with A0A: the alphabets of the other seven.
_ANY = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)
_DIGITS, _CAPITALS = _ANY[:10], _ANY[10:]
_ALPHABETS = (_ANY, _ANY, _DIGITS, _CAPITALS, _ANY, _ANY, _DIGITS)
_STEP = 2_654_435_761  # Knuth's multiplicative hash: a prime, so no accession recurs

ACCESSIONS = math.prod(map(len, _ALPHABETS))
"""Accessions that there are."""


def expected_bytes(lengths: _Lengths) -> _Lengths:
    """Return the bytes of records with so many residues; the headers' are a mean."""
    return _HEADER_BYTES + lengths + lengths // LINE


def make_accessions(numbers: np.ndarray, seed: int) -> list[str]:
    """Return a different accession for every number below `ACCESSIONS`."""
    left = numbers.astype(np.uint64) * np.uint64(_STEP) + np.uint64(seed % ACCESSIONS)
    left %= np.uint64(ACCESSIONS)
    letters = np.empty((len(numbers), 10), np.uint8)
    letters[:, :3] = np.frombuffer(b"A0A", np.uint8)
    for column, alphabet in enumerate(_ALPHABETS, start=3):
        letters[:, column] = alphabet[(left % np.uint64(len(alphabet))).astype(np.intp)]
        left //= np.uint64(len(alphabet))
    text = letters.tobytes().decode("ascii")
    return [text[i : i + 10] for i in range(0, len(text), 10)]


def format_records(
    random: RandomStream,
    accessions: Sequence[str],
    names: Sequence[str],
    residues: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
) -> list[str]:
    """Return records with random cluster sizes and taxa: a header line and the sequence's lines.

    Args:
        random: where to draw from.
        accessions: of each record's representative, which name the cluster too.
        names: of each record's protein.
        residues: uint8 [lines * LINE], ASCII.
        starts: intp [records]: where the sequences are in `residues`, multiples of `LINE`.
        lengths: intp [records].
    """
    sizes = 65_536 // (1 + random.draw(len(accessions), "<u2").astype(np.int64))
    taxa = [TAXA[taxon] for taxon in random.draw(len(accessions), "<u2") % len(TAXA)]
    sequences = _wrapped(residues, starts, lengths)
    return [
        f">UniRef50_{accession} {name} n={size} Tax={taxon} TaxID={taxon_id} "
        f"RepID={accession}_{mnemonic}\n{sequence}"
        for accession, name, size, (taxon, taxon_id, mnemonic), sequence in zip(
            accessions, names, sizes.tolist(), taxa, sequences, strict=True
        )
    ]


def _wrapped(residues: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> list[str]:
    """Return the sequences in lines of `LINE` residues, each line with its newline."""
    newline = ord("\n")
    grid = np.full((len(residues) // LINE, LINE + 1), newline, np.uint8)
    grid[:, :LINE] = residues.reshape(-1, LINE)
    begins = starts // LINE * (LINE + 1)
    ends = begins + lengths + (lengths - 1) // LINE
    flat = grid.reshape(-1)
    flat[ends] = newline
    text = flat.tobytes().decode("ascii")
    places = zip(begins.tolist(), ends.tolist(), strict=True)
    return [text[begin : end + 1] for begin, end in places]
