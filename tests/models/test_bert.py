"""`models.bert`: equal to Hugging Face's BertForMaskedLM, and blind to padding and batch."""

import os

import pytest
import torch
import torch.nn.functional as F

from models.bert import Bert, BertConfig
from models.convert import from_hugging_face

os.environ["HF_HUB_OFFLINE"] = "1"
import transformers

TINY = BertConfig(hidden_size=32, layers=3, heads=4, intermediate_size=48, max_positions=40)
LENGTHS = torch.tensor([23, 9, 17])


def tiny_bert(config=TINY, seed=0):
    torch.manual_seed(seed)
    return Bert(config)


def padded_batch(length=23, lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 25, (len(lengths), length), generator=generator)
    tokens[torch.arange(length) >= lengths[:, None]] = TINY.pad_id
    return tokens


def perturbed_reference(seed=2):
    """A Hugging Face model whose every weight, biases and normalisation too, is random."""
    torch.manual_seed(seed)
    reference = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=TINY.vocab_size,
            hidden_size=TINY.hidden_size,
            num_hidden_layers=TINY.layers,
            num_attention_heads=TINY.heads,
            intermediate_size=TINY.intermediate_size,
            max_position_embeddings=TINY.max_positions,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return reference


def as_ours(reference, directory):
    reference.save_pretrained(directory)
    return from_hugging_face(directory)


def test_protbert_has_the_reference_parameter_count():
    with torch.device("meta"):
        model = Bert(BertConfig())
        reference = transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=30,
                hidden_size=1024,
                num_hidden_layers=30,
                num_attention_heads=16,
                intermediate_size=4096,
                max_position_embeddings=40_000,
            )
        )
    pooler_and_next_sentence = 1024 * 1024 + 1024 + 2 * 1024 + 2
    assert model.num_parameters() == reference.num_parameters()
    assert model.num_parameters() == 420_984_864 - pooler_and_next_sentence


def test_logits_loss_and_gradients_equal_the_reference(tmp_path):
    reference = perturbed_reference()
    config, state = as_ours(reference, tmp_path / "weights")
    assert config == TINY
    model = Bert(config)
    model.load_state_dict(state)

    tokens = padded_batch()
    real = torch.arange(tokens.shape[1]) < LENGTHS[:, None]
    targets = real & (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.3)
    labels = tokens.masked_fill(~targets, -100)
    inputs = tokens.masked_fill(targets, 4)
    theirs = reference(input_ids=inputs, attention_mask=real.long(), labels=labels)
    logits = model(inputs, LENGTHS)
    torch.testing.assert_close(logits[real], theirs.logits[real], rtol=1e-5, atol=1e-5)

    loss = F.cross_entropy(logits[targets], tokens[targets])
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-5, atol=1e-5)

    loss.backward()
    theirs.loss.backward()
    with torch.no_grad():  # gradients have the names and shapes of the weights: convert them alike
        for parameter in reference.parameters():
            parameter.copy_(parameter.grad)
    _, expected = as_ours(reference, tmp_path / "gradients")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_full_batch_equals_the_reference(tmp_path):
    reference = perturbed_reference(seed=5)
    config, state = as_ours(reference, tmp_path)
    model = Bert(config)
    model.load_state_dict(state)
    tokens = padded_batch(lengths=torch.tensor([23, 23]))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing():
    model = tiny_bert()
    short, long = padded_batch(23), padded_batch(40)
    long[:, :23] = short
    long[:, 23:] = 7  # what stands in the padding must not matter either
    short[torch.arange(23) >= LENGTHS[:, None]] = 11
    from_short, from_long = model.encode(short, LENGTHS), model.encode(long, LENGTHS)
    for sample, length in enumerate(LENGTHS):
        torch.testing.assert_close(
            from_short[sample, :length], from_long[sample, :length], rtol=1e-5, atol=1e-5
        )


def test_batch_composition_changes_nothing():
    model = tiny_bert()
    tokens = padded_batch()
    together = model(tokens, LENGTHS)
    for sample, length in enumerate(LENGTHS):
        alone = model(tokens[sample : sample + 1, :length])
        torch.testing.assert_close(together[sample, :length], alone[0], rtol=1e-5, atol=1e-5)


def test_no_lengths_means_no_padding():
    model = tiny_bert()
    tokens = padded_batch(lengths=torch.tensor([23, 23]))
    masked = model(tokens, torch.tensor([23, 23]))
    torch.testing.assert_close(model(tokens), masked, rtol=1e-5, atol=1e-5)


def test_order_of_residues_matters():
    model = tiny_bert(BertConfig(**{**vars(TINY), "initializer_std": 0.3}))
    tokens = torch.tensor([[2, 5, 6, 7, 3]])
    swapped = torch.tensor([[2, 6, 5, 7, 3]])
    assert not torch.allclose(model(tokens)[0, 3], model(swapped)[0, 3], atol=1e-2)


def test_predict_gives_the_logits_of_selected_positions():
    model = tiny_bert()
    hidden = model.encode(padded_batch(), LENGTHS)
    selected = torch.rand(hidden.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.2
    everything = model.predict(hidden)
    torch.testing.assert_close(model.predict(hidden[selected]), everything[selected])


def test_token_ids_may_be_of_any_integer_type():
    model = tiny_bert()
    tokens = padded_batch()
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(model(tokens.to(dtype), LENGTHS.to(torch.int32)), model(tokens, LENGTHS))


def test_equal_seeds_give_equal_weights_and_gradients():
    models = [tiny_bert(seed=7), tiny_bert(seed=7)]
    for model in models:
        model(padded_batch(), LENGTHS).square().sum().backward()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_weights_start_as_the_reference_says():
    model = tiny_bert(BertConfig(hidden_size=128, layers=2, heads=4, intermediate_size=512))
    for name, weight in model.state_dict().items():
        if "norm.weight" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        elif "bias" in name:
            assert not weight.any(), name
        elif "token_type" not in name:  # 2 rows: too few for a spread
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
    assert not model.token_embedding.weight[0].any()
    assert model.token_embedding.weight[1:].all()


def test_padding_embedding_learns_nothing_as_an_input():
    model = tiny_bert()
    model.encode(padded_batch()).square().sum().backward()  # unmasked: padding takes part
    gradient = model.token_embedding.weight.grad
    assert gradient is not None
    assert not gradient[TINY.pad_id].any()
    assert gradient[5:25].any()


def test_both_dropouts_act_in_training_only():
    tokens = padded_batch()
    for field in ("dropout", "attention_dropout"):
        model = tiny_bert(BertConfig(**{**vars(TINY), field: 0.5}))
        assert not torch.equal(model(tokens, LENGTHS), model(tokens, LENGTHS)), field
        model.eval()
        assert torch.equal(model(tokens, LENGTHS), model(tokens, LENGTHS)), field


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30, "heads": 4}, r"hidden_size 30 is not divisible by heads 4: take"),
        ({"pad_id": 30}, r"pad_id 30 is not among the 30 ids of vocab_size: take"),
        ({"layers": 0}, r"layers is 0: it must be at least 1"),
        ({"heads": 0}, r"heads is 0: it must be at least 1"),
        ({"dropout": 1.0}, r"dropout is 1.0: it must be in \[0, 1\)"),
        ({"layer_norm_eps": 0.0}, r"layer_norm_eps is 0.0: it must be above 0"),
    ],
)
def test_impossible_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BertConfig(**changes)


def test_too_long_input_is_refused():
    with pytest.raises(ValueError, match="41 tokens exceeds max_positions 40: crop it"):
        tiny_bert().encode(torch.full((1, 41), 5))
