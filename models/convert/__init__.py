"""Trained models to and from Hugging Face checkpoint directories: safetensors, never a pickle."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from models.architectures import ModelConfig
from models.bert import BertConfig
from models.convert import bert, transformer_xl
from models.convert.files import CONFIG_FILE, check_new, read_json, write_directory

Reader = Callable[[Path, Mapping[str, Any]], tuple[ModelConfig, dict[str, Tensor]]]
_READERS: dict[str, Reader] = {"bert": bert.read, "transfo-xl": transformer_xl.read}
"""model_type of config.json → what reads it."""


def to_hugging_face(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    vocabulary_tokens: Sequence[str],
    substitutes: Mapping[str, str],
    directory: Path,
) -> None:
    """Write a directory that transformers loads without prothpc, with its tokenizer.

    A BERT becomes a `BertForMaskedLM`; a Transformer-XL becomes a `TransfoXLLMHeadModel`, which
    transformers has up to 4.57 and runs up to 4.37. The tokenizer takes proteins with and without
    spaces between the residues, in either case, and replaces residues as training did. `directory`
    appears when it is whole.

    Args:
        state: the model's `state_dict()`, any floating dtype and device.
        config: the model's configuration.
        vocabulary_tokens: token of each id, among them [PAD], [UNK], [CLS], [SEP] and [MASK].
        substitutes: residue → the token that stands for it, for residues not told apart.
        directory: does not exist yet, or is empty.

    Raises:
        ValueError: if `directory` holds something, if the tensors are not those of the
            configuration, or if the vocabulary does not fit it.
    """
    directory = check_new(directory)
    if isinstance(config, BertConfig):
        parts = bert.published(state, config, vocabulary_tokens, substitutes)
    else:
        parts = transformer_xl.published(state, config, vocabulary_tokens, substitutes)
    write_directory(directory, *parts)


def from_hugging_face(directory: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a Hugging Face checkpoint of a BERT or a Transformer-XL.

    Args:
        directory: holds config.json and model.safetensors, or its shards and their index.

    Returns:
        The configuration, and the state for the model's `load_state_dict` in the checkpoint's
        dtype.

    Raises:
        ValueError: if a file is missing or damaged, if the weights are only there pickled, or if
            the architecture or a shape is another one.
    """
    path = directory / CONFIG_FILE
    found = read_json(path)
    if "model_type" not in found:
        raise ValueError(f"{path} names no model_type: it is not a Hugging Face model's")
    kind = found["model_type"]
    if kind not in _READERS:
        known = " and ".join(map(repr, _READERS))
        raise ValueError(f"{path} has model_type {kind!r}: only {known} can be read")
    return _READERS[kind](directory, found)
