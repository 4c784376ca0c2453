"""Transformer-XL in Hugging Face's layout: `TransfoXLLMHeadModel` with a plain softmax."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.convert.files import CONFIG_FILE, check_tensors, load_weights
from models.convert.tokenizer import SPECIAL_TOKENS, tokenizer
from models.transformer_xl import TransformerXL, TransformerXLConfig

_WHAT = "Transformer-XL with a plain softmax"

_CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "layers": "n_layer",
    "heads": "n_head",
    "head_size": "d_head",
    "intermediate_size": "d_inner",
    "memory_length": "mem_len",
    "same_length": "same_length",
    "tied_output": "tie_word_embeddings",
    "layer_norm_eps": "layer_norm_epsilon",
    "dropout": "dropout",
    "attention_dropout": "dropatt",
    "initializer_std": "init_std",
}
"""Field of `TransformerXLConfig` → key of Hugging Face's config.json, where they mean the same."""
_CONFIG_DEFAULTS: dict[str, Any] = {
    "mem_len": 1600,
    "clamp_len": 1000,
    "same_length": True,
    "pre_lnorm": False,
    "untie_r": True,
    "tie_word_embeddings": True,
    "layer_norm_epsilon": 1e-5,
    "dropout": 0.1,
    "dropatt": 0.0,
    "init_std": 0.02,
    "initial_memory": "zeros",
    "cutoffs": [20000, 40000, 200000],
    "div_val": 4,
    "attn_type": 0,
}
"""What transformers takes for keys that a config.json may leave out; `initial_memory` is ours, and
what transformers does."""
_FIXED_CONFIG: dict[str, Any] = {"cutoffs": [], "div_val": 1, "attn_type": 0}
"""A plain softmax, and the attention of the paper."""

_EMBEDDING, _OUTPUT = "transformer.word_emb.emb_layers.0.weight", "crit.out_layers.0.weight"
_MODEL_PARAMETERS = {
    "token_embedding.weight": _EMBEDDING,
    "output_weight": _OUTPUT,
    "output_bias": "crit.out_layers.0.bias",
    "content_bias": "transformer.r_w_bias",
    "position_bias": "transformer.r_r_bias",
}
_LAYER_PARAMETERS = {
    "content_bias": "dec_attn.r_w_bias",
    "position_bias": "dec_attn.r_r_bias",
    "query_key_value.weight": "dec_attn.qkv_net.weight",
    "position.weight": "dec_attn.r_net.weight",
    "attention_output.weight": "dec_attn.o_net.weight",
    "attention_norm.weight": "dec_attn.layer_norm.weight",
    "attention_norm.bias": "dec_attn.layer_norm.bias",
    "feed_forward_in.weight": "pos_ff.CoreNet.0.weight",
    "feed_forward_in.bias": "pos_ff.CoreNet.0.bias",
    "feed_forward_out.weight": "pos_ff.CoreNet.3.weight",
    "feed_forward_out.bias": "pos_ff.CoreNet.3.bias",
    "feed_forward_norm.weight": "pos_ff.layer_norm.weight",
    "feed_forward_norm.bias": "pos_ff.layer_norm.bias",
}
_ATTENTION_BIASES = ("content_bias", "position_bias")
_CONSTANT = "transformer.pos_emb.inv_freq"


def published(
    state: Mapping[str, Tensor],
    config: TransformerXLConfig,
    tokens: Sequence[str],
    substitutes: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the files that `TransfoXLLMHeadModel` and `AutoTokenizer` read, and its tensors.

    A protein becomes [SEP] residues [SEP], as in training's lanes. transformers always starts from
    zeros that take part in attention; a model trained from an empty memory does not know them. The
    arguments and errors are those of `to_hugging_face`.
    """
    check_tensors(state, _shapes(config), "the model's state", _WHAT)
    if len(tokens) != config.vocab_size:
        raise ValueError(
            f"the vocabulary has {len(tokens)} tokens but vocab_size is {config.vocab_size}: "
            "export with the vocabulary that the model was trained with"
        )
    missing = sorted(set(SPECIAL_TOKENS.values()) - set(tokens))
    if missing:
        raise ValueError(f"the vocabulary lacks {', '.join(missing)}, which the tokenizer needs")
    separator = SPECIAL_TOKENS["sep_token"]
    contents = {
        CONFIG_FILE: _config_to_hugging_face(config, tokens),
        "tokenizer.json": tokenizer(tokens, substitutes, first=separator),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids"],
            "clean_up_tokenization_spaces": False,
            **SPECIAL_TOKENS,
        },
        "special_tokens_map.json": SPECIAL_TOKENS,
        "vocab.txt": "\n".join(tokens),
    }
    weights = {
        _published_name(name): _by_head(tensor, config) if _is_attention_bias(name) else tensor
        for name, tensor in state.items()
    }
    for field in _ATTENTION_BIASES if config.shared_biases else ():
        # transformers keeps the one tensor under a name of each layer, too.
        for layer in range(config.layers):
            name = f"transformer.layers.{layer}.{_LAYER_PARAMETERS[field]}"
            weights[name] = weights[_MODEL_PARAMETERS[field]].clone()
    exponents = torch.arange(0, config.hidden_size, 2, dtype=torch.float32) / config.hidden_size
    return contents, {**weights, _CONSTANT: 1 / 10_000**exponents}


def read(
    directory: Path, found: Mapping[str, Any]
) -> tuple[TransformerXLConfig, dict[str, Tensor]]:
    """Return configuration and state from a checkpoint; errors are those of `from_hugging_face`.

    Args:
        directory: of the checkpoint.
        found: the content of its config.json.
    """
    config = _config(found, directory / CONFIG_FILE)
    weights = load_weights(directory, "TransfoXLLMHeadModel")
    weights.pop(_CONSTANT, None)
    if config.tied_output:
        _keep_one(weights, _EMBEDDING, [_OUTPUT], directory)
    for field in _ATTENTION_BIASES if config.shared_biases else ():
        others = [
            f"transformer.layers.{layer}.{_LAYER_PARAMETERS[field]}"
            for layer in range(config.layers)
        ]
        _keep_one(weights, _MODEL_PARAMETERS[field], others, directory)
    shapes = _shapes(config)
    expected = {
        _published_name(name): torch.Size((config.heads, config.head_size))
        if _is_attention_bias(name)
        else shape
        for name, shape in shapes.items()
    }
    check_tensors(weights, expected, str(directory), _WHAT)
    state = {name: weights[_published_name(name)] for name in shapes}
    return config, {
        name: tensor.flatten() if _is_attention_bias(name) else tensor
        for name, tensor in state.items()
    }


def _shapes(config: TransformerXLConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in TransformerXL(config).state_dict().items()}


def _published_name(own_name: str) -> str:
    """Return Hugging Face's name of a parameter."""
    if not own_name.startswith("layers."):
        return _MODEL_PARAMETERS[own_name]
    _, index, name = own_name.split(".", 2)
    return f"transformer.layers.{index}.{_LAYER_PARAMETERS[name]}"


def _is_attention_bias(own_name: str) -> bool:
    return own_name.endswith(_ATTENTION_BIASES)


def _by_head(tensor: Tensor, config: TransformerXLConfig) -> Tensor:
    return tensor.unflatten(0, (config.heads, config.head_size))


def _keep_one(
    weights: dict[str, Tensor], name: str, others: Sequence[str], directory: Path
) -> None:
    """Leave one of several names of one tensor, after a look that all hold the same."""
    present = [n for n in (name, *others) if n in weights]
    tensors = [weights.pop(n) for n in present]
    for other, tensor in zip(present, tensors, strict=True):
        if not torch.equal(tensor, tensors[0]):
            raise ValueError(
                f"{other} of {directory} differs from {present[0]}, but its configuration says "
                "that they are one tensor"
            )
    if tensors:
        weights[name] = tensors[0]


def _config_to_hugging_face(config: TransformerXLConfig, tokens: Sequence[str]) -> dict[str, Any]:
    return {
        "architectures": ["TransfoXLLMHeadModel"],
        "model_type": "transfo-xl",
        **_FIXED_CONFIG,
        **{key: getattr(config, field) for field, key in _CONFIG_KEYS.items()},
        "d_embed": config.hidden_size,
        "clamp_len": -1 if config.clamp_length is None else config.clamp_length,
        "untie_r": not config.shared_biases,
        "pre_lnorm": config.norm == "pre",
        "initial_memory": config.initial_memory,
        "eos_token_id": tokens.index(SPECIAL_TOKENS["sep_token"]),
        "pad_token_id": tokens.index(SPECIAL_TOKENS["pad_token"]),
        "trainer_compatible": True,
    }


def _config(found: Mapping[str, Any], path: Path) -> TransformerXLConfig:
    values = _CONFIG_DEFAULTS | {key: value for key, value in found.items() if value is not None}
    for key, value in _FIXED_CONFIG.items():
        if values[key] != value:
            raise ValueError(
                f"{path} has {key} {values[key]!r}: only {value!r} can be read into this "
                "Transformer-XL"
            )
    missing = [key for key in _CONFIG_KEYS.values() if key not in values]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: the model's sizes are not known")
    if values.get("d_embed", values["d_model"]) != values["d_model"]:
        raise ValueError(
            f"{path} has d_embed {values['d_embed']} and d_model {values['d_model']}: only equal "
            "ones can be read into this Transformer-XL"
        )
    return TransformerXLConfig(
        **{field: values[key] for field, key in _CONFIG_KEYS.items()},
        clamp_length=values["clamp_len"] if values["clamp_len"] > 0 else None,
        shared_biases=not values["untie_r"],
        norm="pre" if values["pre_lnorm"] else "post",
        initial_memory=values["initial_memory"],
    )
