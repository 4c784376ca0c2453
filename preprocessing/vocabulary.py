"""From stored residues to a model's token ids: one 256-entry lookup table per vocabulary.

Records store residues (ASCII capitals); a vocabulary is applied when a batch is made, so one
record set serves every model.
"""

from dataclasses import dataclass

import numpy as np

from preprocessing.errors import InputError

RESIDUES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Letters that a record may hold: the 20 amino acids, U and O, and the ambiguous B, J, X, Z."""

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A model's tokens and the way residues become ids.

    Raises:
        ValueError: if a special token or a residue's substitute is not among the tokens.
    """

    name: str
    tokens: tuple[str, ...]
    """Token of each id, in order of ids."""
    substitutes: dict[str, str]
    """Residues that the model does not tell apart, and the token that stands for each."""
    pad: str
    cls: str
    sep: str
    mask: str

    def __len__(self) -> int:
        return len(self.tokens)

    def id_of(self, token: str) -> int:
        """Return the id of `token`."""
        return self.tokens.index(token)

    def lookup_table(self) -> np.ndarray:
        """Return uint8 [256]: the token id of every residue byte; other bytes give the pad id."""
        table = np.full(256, self.id_of(self.pad), np.uint8)
        for residue in RESIDUES:
            table[ord(residue)] = self.id_of(self.substitutes.get(residue, residue))
        return table

    def amino_acid_ids(self) -> tuple[int, ...]:
        """Return the ids of the 20 amino acids, in the order of `AMINO_ACIDS`."""
        return tuple(self.id_of(letter) for letter in AMINO_ACIDS)


PROTTRANS_BERT = Vocabulary(
    # vocab.txt of Rostlab/prot_bert. B, O, U and Z become X before training (ProtTrans, section
    # 2.1); J (leucine or isoleucine) has no token there and becomes X too.
    name="prottrans-bert",
    tokens=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"LAGVESIKRDTPNQFYMHCWXUBZO"),
    substitutes=dict.fromkeys("BJOUZ", "X"),
    pad="[PAD]",
    cls="[CLS]",
    sep="[SEP]",
    mask="[MASK]",
)

VOCABULARIES = {vocabulary.name: vocabulary for vocabulary in (PROTTRANS_BERT,)}


def get_vocabulary(name: str) -> Vocabulary:
    """Return the vocabulary called `name`.

    Raises:
        InputError: if there is none of that name.
    """
    if name not in VOCABULARIES:
        raise InputError(f"no vocabulary {name!r}: choose one of {', '.join(VOCABULARIES)}")
    return VOCABULARIES[name]
