"""`models.transformer_xl`: equal to transformers' TransfoXL, causal, and blind to segments."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from models.convert import from_hugging_face
from models.transformer_xl import TransformerXL, TransformerXLConfig

FIXTURES = Path(__file__).parent / "transfoxl"
CASES = sorted(path.name for path in FIXTURES.iterdir())
SEGMENTS = (8, 5, 11)
TINY = TransformerXLConfig(
    hidden_size=24, layers=3, heads=3, head_size=6, intermediate_size=40, memory_length=40
)


def changed(**changes):
    return dataclasses.replace(TINY, dropout=0.0, **changes)


def tiny(config=None, seed=0):
    """A model whose every weight, biases and norms too, is random."""
    torch.manual_seed(seed)
    model = TransformerXL(config or changed()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens(length=24, batch=3, seed=1):
    return torch.randint(5, 25, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model, tokens_BL, segments, **keywords):
    """Logits of all segments, one after the other, and the last memory."""
    memory, parts = None, []
    for segment_BL in tokens_BL.split(segments, dim=1):
        logits_BLV, memory = model(segment_BL, memory, **keywords)
        parts.append(logits_BLV)
    return torch.cat(parts, dim=1), memory


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_three_segments_with_memory_equal_the_reference(case, tmp_path):
    """Log-probabilities, memory, loss and gradients; made by transfoxl_reference.py."""
    config, state = from_hugging_face(FIXTURES / case)
    expected = load_file(FIXTURES / case / "computed.safetensors")
    assert config.initial_memory == "zeros"
    if case == "empty-start":
        config = dataclasses.replace(config, initial_memory="empty")
    model = TransformerXL(config)
    model.load_state_dict(state)
    inputs, targets = expected["tokens"][:, :-1], expected["tokens"][:, 1:]
    logits, memory = logits_of(model, inputs, SEGMENTS)
    close(logits.log_softmax(-1), expected["log_probabilities"])
    close(torch.stack(memory), expected["memory"])
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-5, atol=0)
    loss.backward()

    # Gradients have the names and shapes of the weights: read them alike.
    shutil.copy(FIXTURES / case / "config.json", tmp_path)
    prefix = "gradient."
    gradients = {n.removeprefix(prefix): t for n, t in expected.items() if n.startswith(prefix)}
    save_file(gradients, tmp_path / "model.safetensors")
    _, gradients = from_hugging_face(tmp_path)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_fixtures_cover_what_the_configuration_offers():
    configs = [json.loads((FIXTURES / case / "config.json").read_text()) for case in CASES]
    for key, values in (
        ("tie_word_embeddings", {None, False}),
        ("same_length", {False, True}),
        ("clamp_len", {-1, 5}),
        ("untie_r", {False, True}),
        ("pre_lnorm", {False, True}),
    ):
        assert {config.get(key) for config in configs} == values


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("segments", [(8, 8, 8), (1, 2, 3, 18), (23, 1)])
def test_segments_with_a_long_memory_equal_one_long_segment(norm, segments):
    model = tiny(changed(norm=norm))
    close(logits_of(model, tokens(), segments)[0], model(tokens())[0])


@pytest.mark.parametrize("segments", [(8, 8, 8), (3, 4, 17)])
def test_same_length_makes_a_short_memory_as_good_as_a_long_segment(segments):
    """Every position sees 5 positions whatever the segments are."""
    model = tiny(changed(same_length=True, memory_length=5))
    close(logits_of(model, tokens(), segments)[0], model(tokens())[0])


def test_the_last_tokens_of_a_short_memory_are_seen_and_earlier_ones_are_not():
    model = tiny(changed(layers=1, memory_length=4))
    first, second = tokens(16).split(8, dim=1)
    for place, seen in ((3, False), (4, True)):
        other = first.clone()
        other[:, place] = 25 - other[:, place] + 5
        after = [model(second, model(segment)[1])[0] for segment in (first, other)]
        assert torch.equal(*after) != seen


def test_same_length_sees_exactly_memory_length_positions():
    model = tiny(changed(layers=1, same_length=True, memory_length=6))
    sequence = tokens(20)
    for distance, seen in ((5, True), (6, False)):
        other = sequence.clone()
        other[:, 19 - distance] = 29
        last = [model(each)[0][:, -1] for each in (sequence, other)]
        assert torch.equal(*last) != seen


def test_a_position_knows_nothing_of_later_ones():
    model = tiny()
    sequence, other = tokens(), tokens()
    other[:, 12:] = 29
    memory = model(tokens(seed=7))[1]
    close(model(sequence, memory)[0][:, :12], model(other, memory)[0][:, :12])
    assert not torch.allclose(model(sequence)[0][:, 12], model(other)[0][:, 12])


def test_distances_up_to_the_clamp_are_told_apart():
    sequence = tokens(9)
    swapped = sequence.clone()
    swapped[:, [0, 1]] = sequence[:, [1, 0]]  # at distances 8 and 7 of the last position
    for clamp, equal in ((7, True), (8, False)):
        model = tiny(changed(layers=1, clamp_length=clamp))
        last = [model(each)[0][:, -1] for each in (sequence, swapped)]
        assert torch.allclose(*last, rtol=1e-5, atol=1e-5) == equal


def test_lanes_do_not_know_of_one_another():
    model = tiny()
    together, _ = logits_of(model, tokens(), (12, 12))
    for lane in range(3):
        alone, _ = logits_of(model, tokens()[lane : lane + 1], (12, 12))
        close(alone[0], together[lane])


def test_the_memory_is_the_detached_input_of_each_layer():
    model = tiny(changed(memory_length=10))
    _, memory = logits_of(model, tokens()[:, :16], (8, 8))
    assert [tuple(layer.shape) for layer in memory] == [(3, 10, 24)] * 3
    assert not any(layer.requires_grad for layer in memory)
    embedded = model.token_embedding(tokens()[:, 6:16]) * 24**0.5
    close(memory[0], embedded)


def test_evaluation_may_remember_more_and_less_than_training():
    model = tiny(changed(memory_length=4))
    sequence = tokens()
    whole = model(sequence)[0]
    close(logits_of(model, sequence, (8, 8, 8), memory_length=24)[0], whole)
    assert not torch.allclose(logits_of(model, sequence, (8, 8, 8))[0], whole, atol=1e-3)
    forgetful, memory = logits_of(model, sequence, (8, 8, 8), memory_length=0)
    close(forgetful[:, 8:16], model(sequence[:, 8:16])[0])
    assert memory[0].shape[1] == 0


def test_zeros_before_the_first_segment_take_part_in_attention():
    empty = tiny()
    zeros = TransformerXL(changed(initial_memory="zeros")).eval()
    zeros.load_state_dict(empty.state_dict())
    assert not torch.allclose(empty(tokens())[0], zeros(tokens())[0], atol=0.01)


def test_token_ids_may_be_of_any_integer_type():
    model = tiny()
    assert torch.equal(model(tokens().to(torch.uint8))[0], model(tokens())[0])


def test_both_dropouts_act_in_training_only():
    for field in ("dropout", "attention_dropout"):
        model = tiny(dataclasses.replace(changed(), **{field: 0.5})).train()
        assert not torch.equal(model(tokens())[0], model(tokens())[0]), field
        model.eval()
        assert torch.equal(model(tokens())[0], model(tokens())[0]), field


def test_equal_seeds_give_equal_weights():
    one, other = tiny(seed=3), tiny(seed=3)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_start_as_the_reference_says():
    torch.manual_seed(0)
    model = TransformerXL(
        changed(hidden_size=128, head_size=32, intermediate_size=256, tied_output=False)
    )
    for name, weight in model.named_parameters():
        if name.endswith(("content_bias", "position_bias", "weight")):
            mean = 1.0 if "norm" in name else 0.0
            assert weight.mean().item() == pytest.approx(mean, abs=0.01), name
            assert weight.std().item() == pytest.approx(0.02, rel=0.25), name
        else:
            assert not weight.any(), name


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (TransformerXLConfig(), 409.3),  # ProtTXL
        (TransformerXLConfig(layers=32, heads=14, head_size=128), 562.5),  # ProtTXL-BFD
    ],
)
def test_prottxl_has_the_published_number_of_parameters(config, millions):
    with torch.device("meta"):
        count = TransformerXL(config).num_parameters()
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers is 0: it must be at least 1"),
        ({"hidden_size": 25}, "hidden_size is 25: it must be even"),
        ({"memory_length": -1}, "memory_length is -1: it must be at least 0"),
        ({"memory_length": 0, "same_length": True}, "leaves nothing to see: raise memory_length"),
        ({"clamp_length": 0}, "clamp_length is 0: it must be at least 1"),
        ({"dropout": 1.0}, r"dropout is 1.0: it must be in \[0, 1\)"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0: it must be above 0"),
    ],
)
def test_impossible_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerXLConfig(**changes)
