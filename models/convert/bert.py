"""BERT in Hugging Face's layout: `BertForMaskedLM`, `BertForPreTraining`, `BertModel`."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.bert import Bert, BertConfig
from models.convert.files import CONFIG_FILE, check_tensors, load_weights
from models.convert.tokenizer import SPECIAL_TOKENS, tokenizer

_log = logging.getLogger(__name__)

_WHAT = "BERT with a masked-LM head"

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


def published(
    state: Mapping[str, Tensor],
    config: BertConfig,
    tokens: Sequence[str],
    substitutes: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the files that `BertForMaskedLM` and `AutoTokenizer` read, and its tensors.

    (The published ProtBert tokenizer needs spaced capitals and silently makes [UNK] of everything
    else; this one does not.) The arguments and errors are those of `to_hugging_face`.
    """
    check_tensors(state, _shapes(config), "the model's state", _WHAT)
    _check_vocabulary(tokens, config)
    sizes = {key: getattr(config, field) for field, key in _CONFIG_KEYS.items()}
    contents = {
        CONFIG_FILE: {"architectures": ["BertForMaskedLM"], **_FIXED_CONFIG, **sizes},
        "tokenizer.json": tokenizer(tokens, substitutes, first=SPECIAL_TOKENS["cls_token"]),
        "tokenizer_config.json": _tokenizer_config(config),
        "special_tokens_map.json": SPECIAL_TOKENS,
        "vocab.txt": "\n".join(tokens),
    }
    return contents, {_published_name(name): tensor for name, tensor in state.items()}


def read(directory: Path, found: Mapping[str, Any]) -> tuple[BertConfig, dict[str, Tensor]]:
    """Return configuration and state from a checkpoint.

    Tensors that a masked language model does not use (pooler, next sentence) are left out, and a
    missing masked-language-model head, as in a checkpoint of `BertModel`, starts anew from a fixed
    seed; both are logged. The errors are those of `from_hugging_face`.

    Args:
        directory: of the checkpoint.
        found: the content of its config.json.
    """
    config = _config(found, directory / CONFIG_FILE)
    loaded = load_weights(directory, "BertForMaskedLM")
    weights = {_modern_name(name): tensor for name, tensor in loaded.items()}
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
    expected = {_published_name(name): shape for name, shape in shapes.items()}
    check_tensors(weights, expected, str(directory), _WHAT)
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


def _check_vocabulary(tokens: Sequence[str], config: BertConfig) -> None:
    if len(tokens) != config.vocab_size:
        raise ValueError(
            f"the vocabulary has {len(tokens)} tokens but vocab_size is {config.vocab_size}: "
            "export with the vocabulary that the model was trained with"
        )
    missing = sorted(set(SPECIAL_TOKENS.values()) - set(tokens))
    if missing:
        raise ValueError(f"the vocabulary lacks {', '.join(missing)}, which BERT tokenizers need")
    if tokens[config.pad_id] != SPECIAL_TOKENS["pad_token"]:
        raise ValueError(
            f"pad_id {config.pad_id} is {tokens[config.pad_id]!r} in the vocabulary, not "
            f"{SPECIAL_TOKENS['pad_token']!r}: set pad_id to {tokens.index('[PAD]')}"
        )


def _config(found: Mapping[str, Any], path: Path) -> BertConfig:
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


def _tokenizer_config(config: BertConfig) -> dict[str, Any]:
    return {
        # Takes tokenizer.json as it stands; BertTokenizer would build its own from vocab.txt.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "model_max_length": config.max_positions,
        "padding_side": "right",
        "do_lower_case": False,
        "clean_up_tokenization_spaces": False,
        **SPECIAL_TOKENS,
    }
