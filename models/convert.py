"""Trained models to and from Hugging Face checkpoint directories: safetensors, never a pickle."""

import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.bert import Bert, BertConfig

_log = logging.getLogger(__name__)

_CONFIG_FILE = "config.json"
_WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"

_SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "pad_id": "pad_token_id",
    "layer_norm_eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "initializer_std": "initializer_range",
}
"""Field of `BertConfig` → key of Hugging Face's config.json."""
_FIXED_CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
"""What `Bert` is by construction; a checkpoint that says otherwise is another architecture."""
_CONFIG_DEFAULTS = {
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
}
"""What transformers takes for keys that a config.json may leave out."""

_MODULES = {
    "token_embedding": "bert.embeddings.word_embeddings",
    "position_embedding": "bert.embeddings.position_embeddings",
    "token_type_embedding": "bert.embeddings.token_type_embeddings",
    "embedding_norm": "bert.embeddings.LayerNorm",
    "head_dense": "cls.predictions.transform.dense",
    "head_norm": "cls.predictions.transform.LayerNorm",
}
_LAYER_MODULES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward_in": "intermediate.dense",
    "feed_forward_out": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}
_HEAD_BIAS = "cls.predictions.bias"
_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": _HEAD_BIAS,
}
"""Second name of a tensor → its first; newer checkpoints hold the first only."""
_WITHOUT_ROLE = ("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids")
"""Of sentence-pair training, and a constant: a masked language model does not use them."""


def to_hugging_face(
    state: Mapping[str, Tensor],
    config: BertConfig,
    vocabulary_tokens: Sequence[str],
    substitutes: Mapping[str, str],
    directory: Path,
) -> None:
    """Write a directory that `BertForMaskedLM` and `AutoTokenizer` load without prothpc.

    The tokenizer takes proteins with and without spaces between the residues, in either case, and
    replaces residues as training did. (The published ProtBert tokenizer needs spaced capitals and
    silently makes [UNK] of everything else.) `directory` appears when it is whole.

    Args:
        state: `Bert.state_dict()`, any floating dtype and device.
        config: the model's configuration.
        vocabulary_tokens: token of each id, among them [PAD], [UNK], [CLS], [SEP] and [MASK].
        substitutes: residue → the token that stands for it, for residues not told apart.
        directory: does not exist yet, or is empty.

    Raises:
        ValueError: if `directory` holds something, if the tensors are not those of the
            configuration, or if the vocabulary does not fit it.
    """
    directory = directory.resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists already: export to a new or an empty directory")
    _check_tensors(state, _shapes(config), "the model's state")
    _check_vocabulary(vocabulary_tokens, config)
    contents = {
        _CONFIG_FILE: _config_to_hugging_face(config),
        "tokenizer.json": _tokenizer(vocabulary_tokens, substitutes),
        "tokenizer_config.json": _tokenizer_config(config),
        "special_tokens_map.json": _SPECIAL_TOKENS,
    }
    files = {name: json.dumps(content, indent=2) for name, content in contents.items()}
    files["vocab.txt"] = "\n".join(vocabulary_tokens)
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        weights = {
            _published_name(name): tensor.contiguous().cpu() for name, tensor in state.items()
        }
        for name, text in files.items():
            (unfinished / name).write_text(text + "\n", encoding="utf-8")
        save_file(weights, unfinished / _WEIGHTS_FILE, metadata={"format": "pt"})
        # safetensors lets nobody but its owner read the file; a group shares its models.
        shutil.copymode(unfinished / _CONFIG_FILE, unfinished / _WEIGHTS_FILE)
        os.replace(unfinished, directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def from_hugging_face(directory: Path) -> tuple[BertConfig, dict[str, Tensor]]:
    """Read a Hugging Face BERT checkpoint.

    Tensors that a masked language model does not use (pooler, next sentence) are left out, and a
    missing masked-language-model head, as in a checkpoint of `BertModel`, starts anew from a fixed
    seed; both are logged.

    Args:
        directory: holds config.json and model.safetensors, or its shards and their index.

    Returns:
        The configuration, and the state for `Bert.load_state_dict` in the checkpoint's dtype.

    Raises:
        ValueError: if a file is missing or damaged, if the weights are only there pickled, or if
            the architecture or a shape is another one.
    """
    config = _config_from_hugging_face(directory / _CONFIG_FILE)
    weights = {_modern_name(name): tensor for name, tensor in _load_weights(directory).items()}
    # A checkpoint of the bare encoder (BertModel) has no prefix.
    if not any(name.startswith("bert.") for name in weights):
        weights = {
            name if name.startswith("cls.") else f"bert.{name}": tensor
            for name, tensor in weights.items()
        }
    ignored = sorted(name for name in weights if name.startswith(_WITHOUT_ROLE))
    if ignored:
        _log.warning("%s: left out, no part of a masked LM: %s", directory, ", ".join(ignored))
    for name in ignored:
        del weights[name]
    _drop_tied(weights, directory)
    if not any(name.startswith("cls.") for name in weights):
        _log.warning("%s has no masked-LM head: it starts anew and needs training", directory)
        weights |= _new_head(config)
    shapes = _shapes(config)
    _check_tensors(
        weights, {_published_name(name): shape for name, shape in shapes.items()}, str(directory)
    )
    return config, {name: weights[_published_name(name)] for name in shapes}


def _published_name(own_name: str) -> str:
    """Return Hugging Face's name of a parameter."""
    if own_name == "head_bias":
        return _HEAD_BIAS
    if not own_name.startswith("layers."):
        module, kind = own_name.split(".")
        return f"{_MODULES[module]}.{kind}"
    _, index, module, kind = own_name.split(".")
    return f"bert.encoder.layer.{index}.{_LAYER_MODULES[module]}.{kind}"


def _shapes(config: BertConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Bert(config).state_dict().items()}


def _check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, torch.Size], where: str
) -> None:
    for problem, names in (
        ("lacks", sorted(expected.keys() - found.keys())),
        ("has the unknown", sorted(found.keys() - expected.keys())),
    ):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"{where} {problem} {', '.join(names[:3])}{rest}: it is not a BERT with a "
                "masked-LM head of the sizes in its configuration"
            )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{name} of {where} is of shape {tuple(found[name].shape)}, but the configuration "
                f"asks for {tuple(shape)}: they are not of one model"
            )


def _check_vocabulary(tokens: Sequence[str], config: BertConfig) -> None:
    if len(tokens) != config.vocab_size:
        raise ValueError(
            f"the vocabulary has {len(tokens)} tokens but vocab_size is {config.vocab_size}: "
            "export with the vocabulary that the model was trained with"
        )
    missing = sorted(set(_SPECIAL_TOKENS.values()) - set(tokens))
    if missing:
        raise ValueError(f"the vocabulary lacks {', '.join(missing)}, which BERT tokenizers need")
    if tokens[config.pad_id] != _SPECIAL_TOKENS["pad_token"]:
        raise ValueError(
            f"pad_id {config.pad_id} is {tokens[config.pad_id]!r} in the vocabulary, not "
            f"{_SPECIAL_TOKENS['pad_token']!r}: set pad_id to {tokens.index('[PAD]')}"
        )


def _config_to_hugging_face(config: BertConfig) -> dict[str, Any]:
    sizes = {key: getattr(config, field) for field, key in _CONFIG_KEYS.items()}
    return {"architectures": ["BertForMaskedLM"], **_FIXED_CONFIG, **sizes}


def _config_from_hugging_face(path: Path) -> BertConfig:
    found = _read_json(path)
    if "model_type" not in found:
        raise ValueError(f"{path} names no model_type: it is not a Hugging Face BERT's")
    for key, value in _FIXED_CONFIG.items():
        if found.get(key, value) != value:
            raise ValueError(
                f"{path} has {key} {found[key]!r}: only {value!r} can be read into this BERT"
            )
    values = _CONFIG_DEFAULTS | {key: value for key, value in found.items() if value is not None}
    missing = [key for key in _CONFIG_KEYS.values() if key not in values]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: the model's sizes are not known")
    return BertConfig(**{field: values[key] for field, key in _CONFIG_KEYS.items()})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: name the directory of a Hugging Face checkpoint"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch the checkpoint again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object: fetch the checkpoint again")
    return content


def _load_weights(directory: Path) -> dict[str, Tensor]:
    if (directory / _WEIGHTS_FILE).exists():
        names = [_WEIGHTS_FILE]
    elif (directory / _INDEX_FILE).exists():
        index = _read_json(directory / _INDEX_FILE).get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(f"{directory / _INDEX_FILE} has no weight_map: fetch it again")
        names = sorted(set(index.values()))
    else:
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        if pickled:
            raise ValueError(
                f"{directory} has its weights only in {pickled[0]}, a pickle, which can run any "
                "code when it is read: convert it once where you trust it, with transformers' "
                "BertForMaskedLM.from_pretrained(OLD).save_pretrained(NEW)"
            )
        raise ValueError(
            f"{directory} has neither {_WEIGHTS_FILE} nor {_INDEX_FILE}: fetch the checkpoint "
            "again with its weights"
        )
    weights: dict[str, Tensor] = {}
    for name in names:
        path = directory / Path(name).name  # an index names files beside it
        try:
            weights |= load_file(path)
        except (FileNotFoundError, SafetensorError) as error:
            raise ValueError(f"{path} is missing or damaged ({error}): fetch it again") from None
    return weights


def _modern_name(name: str) -> str:
    # Checkpoints converted from TensorFlow call the normalisation's weight and bias gamma and beta.
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def _drop_tied(weights: dict[str, Tensor], directory: Path) -> None:
    """Remove the second copies of tied tensors, after a look that they are copies."""
    for name, original in _TIED.items():
        if name not in weights:
            continue
        decoder = weights.pop(name)
        if original in weights and not torch.equal(decoder, weights[original]):
            raise ValueError(
                f"{name} of {directory} differs from {original}: only tied ones can be read"
            )


def _new_head(config: BertConfig) -> dict[str, Tensor]:
    size = config.hidden_size
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(size, size, generator=generator) * config.initializer_std
    return {
        _MODULES["head_dense"] + ".weight": dense,
        _MODULES["head_dense"] + ".bias": torch.zeros(size),
        _MODULES["head_norm"] + ".weight": torch.ones(size),
        _MODULES["head_norm"] + ".bias": torch.zeros(size),
        _HEAD_BIAS: torch.zeros(config.vocab_size),
    }


def _tokenizer(tokens: Sequence[str], substitutes: Mapping[str, str]) -> dict[str, Any]:
    """Return tokenizer.json: one token per residue, whatever the case and the spacing."""
    ids = {token: index for index, token in enumerate(tokens)}
    cls, sep = _SPECIAL_TOKENS["cls_token"], _SPECIAL_TOKENS["sep_token"]
    verbatim = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    single = [
        {"SpecialToken": {"id": cls, "type_id": 0}},
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
            for token in sorted(_SPECIAL_TOKENS.values(), key=ids.__getitem__)
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
                token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (cls, sep)
            },
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": _SPECIAL_TOKENS["unk_token"]},
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


def _tokenizer_config(config: BertConfig) -> dict[str, Any]:
    return {
        # Takes tokenizer.json as it stands; BertTokenizer would build its own from vocab.txt.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "model_max_length": config.max_positions,
        "padding_side": "right",
        "do_lower_case": False,
        "clean_up_tokenization_spaces": False,
        **_SPECIAL_TOKENS,
    }
