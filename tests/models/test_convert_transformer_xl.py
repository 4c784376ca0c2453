"""`models.convert` for Transformer-XL: round trips, and what is refused.

That transformers loads what we export, and computes the same, is checked by `make test-transfoxl`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.convert import from_hugging_face, to_hugging_face
from models.transformer_xl import TransformerXL, TransformerXLConfig
from preprocessing.vocabulary import PROTTRANS_BERT

FIXTURES = Path(__file__).parent / "transfoxl"
TINY = {"hidden_size": 16, "layers": 2, "heads": 2, "head_size": 6, "intermediate_size": 24}
VARIANTS = (
    {},
    {"tied_output": False, "norm": "pre", "initial_memory": "zeros"},
    {"shared_biases": True, "same_length": True, "clamp_length": 9, "memory_length": 7},
)


def export(model, directory, tokens=PROTTRANS_BERT.tokens):
    to_hugging_face(model.state_dict(), model.config, tokens, PROTTRANS_BERT.substitutes, directory)


def edit(directory, *, weights=None, config=None):
    if weights:
        path = directory / "model.safetensors"
        save_file(weights(load_file(path)), path, metadata={"format": "pt"})
    if config:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copytree(FIXTURES / "plain", tmp_path / "plain"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bitwise(tmp_path, variant, dtype):
    torch.manual_seed(0)
    model = TransformerXL(TransformerXLConfig(**TINY, **variant)).to(dtype)
    export(model, tmp_path / "out")
    config, state = from_hugging_face(tmp_path / "out")
    assert config == model.config
    assert list(state) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == dtype
        assert torch.equal(state[name], tensor), name


def test_the_layout_is_that_of_transformers(tmp_path):
    """Names and shapes are those of a checkpoint that transformers saved."""
    config, _ = from_hugging_face(FIXTURES / "plain")
    export(TransformerXL(config), tmp_path / "out")
    ours, theirs = (
        load_file(d / "model.safetensors") for d in (tmp_path / "out", FIXTURES / "plain")
    )
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    constant = "transformer.pos_emb.inv_freq"
    torch.testing.assert_close(ours[constant], theirs[constant])
    kept = json.loads((FIXTURES / "plain" / "config.json").read_text())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    same = written.keys() & kept.keys() - {"eos_token_id"}
    assert len(same) > 15
    assert {key: written[key] for key in same} == {key: kept[key] for key in same}


def test_a_tied_output_may_be_stored_under_either_name(checkpoint):
    _, expected = from_hugging_face(checkpoint)
    embedding, output = "transformer.word_emb.emb_layers.0.weight", "crit.out_layers.0.weight"
    edit(checkpoint, weights=lambda w: w | {output: w[embedding].clone()})
    _, both = from_hugging_face(checkpoint)
    edit(checkpoint, weights=lambda w: {n: t for n, t in w.items() if n != embedding})
    _, one = from_hugging_face(checkpoint)
    for state in (both, one):
        assert torch.equal(state["token_embedding.weight"], expected["token_embedding.weight"])
    edit(checkpoint, weights=lambda w: w | {embedding: w[output] + 1})
    with pytest.raises(ValueError, match=f"{output} .* differs from {embedding}"):
        from_hugging_face(checkpoint)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cutoffs": [10]}, r"cutoffs \[10\]: only \[\]"),
        ({"div_val": 4}, "div_val 4: only 1"),
        ({"attn_type": 2}, "attn_type 2: only 0"),
        ({"d_embed": 8}, "d_embed 8 and d_model 16: only equal"),
        ({"n_head": None}, "lacks n_head"),
        ({"n_layer": 3}, "lacks transformer.layers.2.*and 10 more"),
        ({"d_inner": 25}, r"CoreNet.0.weight .* \(24, 16\), .* asks for \(25, 16\)"),
        ({"model_type": "xlnet"}, "model_type 'xlnet': only 'bert' and 'transfo-xl' can be read"),
    ],
)
def test_other_architectures_are_refused(checkpoint, config, message):
    edit(checkpoint, config=config)
    with pytest.raises(ValueError, match=message):
        from_hugging_face(checkpoint)


def test_pickled_weights_are_refused(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"TransfoXLLMHeadModel.from_pretrained\(OLD\)"):
        from_hugging_face(checkpoint)


def test_what_does_not_fit_is_not_exported(tmp_path):
    model = TransformerXL(TransformerXLConfig(**TINY))
    for tokens, message in (
        (PROTTRANS_BERT.tokens[:-1], "29 tokens but vocab_size is 30"),
        (("<pad>", *PROTTRANS_BERT.tokens[1:]), r"lacks \[PAD\]"),
    ):
        with pytest.raises(ValueError, match=message):
            export(model, tmp_path / "out", tokens)
    state = {name: t for name, t in model.state_dict().items() if name != "output_bias"}
    with pytest.raises(ValueError, match="the model's state lacks output_bias"):
        to_hugging_face(state, model.config, PROTTRANS_BERT.tokens, {}, tmp_path / "out")
    assert not any(tmp_path.iterdir())
