"""tokenizer.json: one token per residue, whatever the case and the spacing."""

from collections.abc import Mapping, Sequence
from typing import Any

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def tokenizer(
    tokens: Sequence[str], substitutes: Mapping[str, str], *, first: str
) -> dict[str, Any]:
    """Return the content of tokenizer.json.

    Args:
        tokens: token of each id, among them the special ones.
        substitutes: residue → the token that stands for it, for residues not told apart.
        first: special token before a protein; [SEP] comes after it.
    """
    ids = {token: index for index, token in enumerate(tokens)}
    sep = SPECIAL_TOKENS["sep_token"]
    verbatim = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    single = [
        {"SpecialToken": {"id": first, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": sep, "type_id": 0}},
    ]
    second = [
        {"Sequence": {"id": "B", "type_id": 1}},
        {"SpecialToken": {"id": sep, "type_id": 1}},
    ]
    characters = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": ids[token], "content": token, "special": True, **verbatim}
            for token in sorted(SPECIAL_TOKENS.values(), key=ids.__getitem__)
        ],
        "normalizer": {"type": "Sequence", "normalizers": _spellings(tokens, substitutes)},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, {**characters, "invert": False}],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single + second,
            "special_tokens": {
                token: {"id": token, "ids": [ids[token]], "tokens": [token]}
                for token in {first: None, sep: None}
            },
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": SPECIAL_TOKENS["unk_token"]},
    }


def _spellings(tokens: Sequence[str], substitutes: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the replacements that write every letter as the token that stands for it."""
    spellings: dict[str, str] = {}
    for letter in _LETTERS:
        token = substitutes.get(letter, letter)
        if token in tokens:
            others = letter.lower() if token == letter else letter + letter.lower()
            spellings[token] = spellings.get(token, "") + others
    return [
        {"type": "Replace", "pattern": {"Regex": f"[{letters}]"}, "content": token}
        for token, letters in spellings.items()
    ]
