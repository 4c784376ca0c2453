"""`models.objectives`: the masks that were asked for, from the sample's seed alone."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.bert import Bert, BertConfig
from models.objectives import (
    masked_lm,
    masked_lm_loss,
    masked_lm_scores,
    shuffle_residues,
    splitmix64,
)

PAD, CLS, SEP, MASK = 0, 2, 3, 4
AMINO_ACIDS = tuple(range(5, 25))
BITS = (1 << 64) - 1

# What `test_masks_of_known_seeds` expects, sample by sample.
GOLDEN_TARGETS = [
    [3, 8, 12, 16, 20, 22, 23, 28, 31, 33, 36, 37, 40],
    [2, 3, 5, 11, 13, 15, 19, 20, 24, 27, 31, 40],
]
GOLDEN_INPUTS = [[4] * 13, [4, 4, 4, 4, 4, 4, 23, 4, 4, 4, 15, 21]]
GOLDEN_SHUFFLE = (
    "2 16 15 20 13 24 8 17 8 6 17 22 10 18 23 11 5 19 14 23 20 "
    "21 6 7 10 13 18 16 19 22 7 14 24 5 11 15 9 12 21 12 9 3"
)


def proteins(lengths, width=None, seed=0):
    """[CLS] residues [SEP] padding; `lengths` count the two special tokens."""
    lengths = torch.as_tensor(lengths)
    width = width or int(lengths.max())
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 25, (len(lengths), width), generator=generator)
    positions = torch.arange(width)
    tokens[:, 0] = CLS
    tokens[positions == lengths[:, None] - 1] = SEP
    tokens[positions >= lengths[:, None]] = PAD
    return tokens, lengths


def corrupt(tokens, lengths, seeds, **options):
    return masked_lm(tokens, lengths, seeds, mask_id=MASK, random_ids=AMINO_ACIDS, **options)


def within_binomial_bounds(count, total, share):
    # 5 standard deviations; the seeds are fixed, so this holds always or never.
    return abs(count - total * share) < 5 * math.sqrt(total * share * (1 - share))


def python_splitmix64(state):
    state = (state + 0x9E3779B97F4A7C15) & BITS
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & BITS
    return state ^ (state >> 31)


def python_draw(seed, position, draw):
    stream = python_splitmix64(seed & BITS)
    return python_splitmix64((stream + (4 * position + draw) * 0x9E3779B97F4A7C15) & BITS)


def unsigned(tensor):
    return [value & BITS for value in tensor.tolist()]


def test_splitmix64_gives_the_published_outputs():
    gamma = 0x9E3779B97F4A7C15 - (1 << 64)
    states = torch.tensor([0, 0, 1234567, 1234567]) + torch.tensor([0, 1, 0, 1]) * gamma
    assert unsigned(splitmix64(states)) == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        6457827717110365317,
        3203168211198807973,
    ]


def test_splitmix64_agrees_with_unlimited_integers():
    states = torch.randint(-(2**63), 2**63 - 1, (500,), generator=torch.Generator().manual_seed(0))
    states = torch.cat([states, torch.tensor([0, -1, 2**63 - 1, -(2**63)])])
    assert unsigned(splitmix64(states)) == [python_splitmix64(s) for s in unsigned(states)]


def test_masks_agree_with_unlimited_integers():
    tokens, lengths = proteins([60, 41], width=64)
    seeds = torch.tensor([-5, 2**62 + 11])
    inputs, targets = corrupt(tokens, lengths, seeds, probability=0.5)
    for sample, seed in enumerate(seeds.tolist()):
        for position in range(64):
            target, kind, which = (python_draw(seed, position, d) >> 40 for d in range(3))
            token = tokens[sample, position].item()
            is_target = 0 < position < lengths[sample] - 1 and target < 0.5 * 2**24
            expected = token
            if is_target and kind < round(0.8 * 2**24):
                expected = MASK
            elif is_target and kind < round(0.8 * 2**24) + round(0.1 * 2**24):
                expected = AMINO_ACIDS[which * 20 >> 24]
            assert targets[sample, position] == is_target
            assert inputs[sample, position] == expected


def test_masks_of_known_seeds():
    """Another algorithm would change every run that is resumed or compared: keep the numbers."""
    tokens = torch.tensor([[CLS, *AMINO_ACIDS, *AMINO_ACIDS, SEP]] * 2)
    lengths, seeds = torch.tensor([42, 42]), torch.tensor([0, 20_000_000_000])
    inputs, targets = corrupt(tokens, lengths, seeds, probability=0.3)
    assert [row.nonzero().flatten().tolist() for row in targets] == GOLDEN_TARGETS
    assert [row[hit].tolist() for row, hit in zip(inputs, targets, strict=True)] == GOLDEN_INPUTS
    shuffled = shuffle_residues(tokens, lengths, seeds)[0]
    assert " ".join(map(str, shuffled.tolist())) == GOLDEN_SHUFFLE


def test_shares_are_those_asked_for():
    tokens, lengths = proteins([502] * 400)
    inputs, targets = corrupt(tokens, lengths, torch.arange(400))
    total = int(targets.sum())
    assert within_binomial_bounds(total, 400 * 500, 0.15)
    masked = (inputs == MASK) & targets
    assert within_binomial_bounds(int(masked.sum()), total, 0.8)
    # One in twenty random replacements is the residue itself.
    changed = targets & ~masked & (inputs != tokens)
    assert within_binomial_bounds(int(changed.sum()), total, 0.1 * 19 / 20)
    assert torch.equal(inputs[~targets], tokens[~targets])


def test_random_residues_are_drawn_evenly():
    tokens, lengths = proteins([502] * 200)
    ids = (5, 9, 24)
    options = {"probability": 0.5, "mask_share": 0.0, "random_share": 1.0}
    inputs, targets = masked_lm(
        tokens, lengths, torch.arange(200), mask_id=MASK, random_ids=ids, **options
    )
    drawn = inputs[targets]
    for token in ids:
        assert within_binomial_bounds(int((drawn == token).sum()), len(drawn), 1 / 3)
    assert set(drawn.tolist()) == set(ids)


def test_positions_seeds_and_draws_are_independent():
    tokens, lengths = proteins([502] * 400)
    _, targets = corrupt(tokens, lengths, torch.arange(400), probability=0.3)
    residues = targets[:, 1:-1]
    neighbours = residues[:, 1:] & residues[:, :-1]
    assert within_binomial_bounds(int(neighbours.sum()), neighbours.numel(), 0.09)
    seeds = residues[1:] & residues[:-1]  # consecutive seeds
    assert within_binomial_bounds(int(seeds.sum()), seeds.numel(), 0.09)


def test_specials_and_padding_are_never_targets():
    tokens, lengths = proteins([2, 3, 10, 30], width=33)
    inputs, targets = corrupt(tokens, lengths, torch.arange(4), probability=1.0)
    positions = torch.arange(33)
    assert torch.equal(targets, (positions > 0) & (positions < lengths[:, None] - 1))
    assert torch.equal(inputs[~targets], tokens[~targets])


def test_a_sample_is_masked_alike_in_any_batch_order_and_padding():
    tokens, lengths = proteins([50, 31, 12, 44])
    seeds = torch.tensor([3, 1, 4, 1 << 40])
    inputs, targets = corrupt(tokens, lengths, seeds)
    shuffled = shuffle_residues(tokens, lengths, seeds)
    for sample, length in enumerate(lengths.tolist()):
        one = slice(sample, sample + 1)
        for width in (length, 70):
            alone = torch.full((1, width), PAD)
            alone[0, :length] = tokens[sample, :length]
            inputs_alone, targets_alone = corrupt(alone, lengths[one], seeds[one])
            assert torch.equal(inputs_alone[0, :length], inputs[sample, :length])
            assert torch.equal(targets_alone[0, :length], targets[sample, :length])
            shuffled_alone = shuffle_residues(alone, lengths[one], seeds[one])
            assert torch.equal(shuffled_alone[0, :length], shuffled[sample, :length])
    order = torch.tensor([2, 0, 3, 1])
    inputs_reordered, targets_reordered = corrupt(tokens[order], lengths[order], seeds[order])
    assert torch.equal(inputs_reordered, inputs[order])
    assert torch.equal(targets_reordered, targets[order])


def test_another_epoch_has_another_mask():
    tokens, lengths = proteins([502] * 4)
    _, first = corrupt(tokens, lengths, torch.tensor([1, 2, 3, 4]))
    _, second = corrupt(tokens, lengths, torch.tensor([5, 6, 7, 8]))
    assert not torch.equal(first, second)


def test_evaluation_masks_every_target_of_training():
    tokens, lengths = proteins([40, 25])
    seeds = torch.tensor([8, 9])
    _, targets = corrupt(tokens, lengths, seeds)
    inputs, evaluated = masked_lm(
        tokens, lengths, seeds, mask_id=MASK, random_ids=(), mask_share=1.0, random_share=0.0
    )
    assert torch.equal(evaluated, targets)
    assert torch.equal(inputs, tokens.masked_fill(targets, MASK))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_inputs_keep_the_type_of_the_tokens(dtype):
    tokens, lengths = proteins([80, 25])
    seeds = torch.tensor([8, 9])
    inputs, targets = corrupt(tokens.to(dtype), lengths.to(torch.int32), seeds)
    expected_inputs, expected_targets = corrupt(tokens, lengths, seeds)
    assert inputs.dtype == dtype
    assert torch.equal(inputs.long(), expected_inputs)
    assert torch.equal(targets, expected_targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 1.5}, "a share of 1.5"),
        ({"mask_share": 0.8, "random_share": 0.3}, "mask_share 0.8 and random_share 0.3"),
        ({"random_ids": ()}, "random_ids is empty"),
    ],
)
def test_impossible_shares_are_refused(options, message):
    tokens, lengths = proteins([10])
    options = {"random_ids": AMINO_ACIDS, **options}
    with pytest.raises(ValueError, match=message):
        masked_lm(tokens, lengths, torch.tensor([0]), mask_id=MASK, **options)


def test_shuffling_keeps_composition_and_specials():
    tokens, lengths = proteins([50, 31, 2, 3, 44], width=60)
    shuffled = shuffle_residues(tokens, lengths, torch.arange(5))
    for before, after, length in zip(tokens, shuffled, lengths.tolist(), strict=True):
        assert torch.equal(before.sort().values, after.sort().values)
        assert after[0] == CLS
        assert after[length - 1] == SEP
        assert torch.equal(after[length:], before[length:])
    assert (shuffled[0] != tokens[0]).sum() > 30
    assert not torch.equal(shuffled, shuffle_residues(tokens, lengths, torch.arange(5, 10)))


def test_shuffling_takes_a_residue_anywhere():
    tokens = torch.tensor([[CLS, 5, 6, 7, 8, SEP]] * 4000)
    shuffled = shuffle_residues(tokens, torch.full((4000,), 6), torch.arange(4000))
    for position in range(1, 5):
        for token in range(5, 9):
            count = int((shuffled[:, position] == token).sum())
            assert within_binomial_bounds(count, 4000, 0.25)


def tiny_model_and_batch():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, layers=1, heads=2, intermediate_size=32, initializer_std=0.5
    )
    model = Bert(config)
    tokens, lengths = proteins([30, 12, 21])
    inputs, targets = corrupt(tokens, lengths, torch.tensor([1, 2, 3]))
    return model, inputs, lengths, tokens, targets


def test_loss_is_the_sum_of_cross_entropies_at_targets():
    model, inputs, lengths, tokens, targets = tiny_model_and_batch()
    loss = masked_lm_loss(model, inputs, lengths, tokens, targets)
    logits = model(inputs, lengths)
    expected = sum(
        -F.log_softmax(logits[b, i], 0)[tokens[b, i]] for b, i in targets.nonzero().tolist()
    )
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected)


def test_scores_of_samples_add_up_to_the_loss():
    model, inputs, lengths, tokens, targets = tiny_model_and_batch()
    loss_B, correct_B, targets_B = masked_lm_scores(model, inputs, lengths, tokens, targets)
    loss = masked_lm_loss(model, inputs, lengths, tokens, targets)
    torch.testing.assert_close(loss_B.sum(), loss)
    assert targets_B.tolist() == targets.sum(1).tolist()
    right = model(inputs, lengths).argmax(-1) == tokens
    assert correct_B.tolist() == [int(right[b][targets[b]].sum()) for b in range(3)]
    for b in range(3):
        alone = masked_lm_scores(
            model, inputs[b : b + 1], lengths[b : b + 1], tokens[b : b + 1], targets[b : b + 1]
        )
        torch.testing.assert_close(alone[0][0], loss_B[b])


def test_tokens_that_are_no_targets_do_not_count():
    model, inputs, lengths, tokens, targets = tiny_model_and_batch()
    others = tokens.masked_fill(~targets, 5)
    assert torch.equal(
        masked_lm_loss(model, inputs, lengths, tokens, targets),
        masked_lm_loss(model, inputs, lengths, others, targets),
    )
    assert masked_lm_loss(model, inputs, lengths, tokens, torch.zeros_like(targets)) == 0


def test_cross_entropy_is_taken_in_float32():
    tokens = torch.full((1, 1000), 5, dtype=torch.uint8)
    targets = torch.ones(1, 1000, dtype=torch.bool)
    logits = torch.zeros(1, 1000, 30, dtype=torch.bfloat16)
    loss = masked_lm_loss(lambda *_: logits, tokens, None, tokens, targets)
    assert loss.item() == pytest.approx(1000 * math.log(30), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_masks_on_the_gpu_equal_those_on_the_cpu():
    tokens, lengths = proteins([500, 31, 120])
    seeds = torch.tensor([3, -1, 1 << 60])
    on_gpu = [tensor.cuda() for tensor in (tokens, lengths, seeds)]
    for expected, found in zip(corrupt(tokens, lengths, seeds), corrupt(*on_gpu), strict=True):
        assert torch.equal(expected, found.cpu())
    assert torch.equal(shuffle_residues(tokens, lengths, seeds), shuffle_residues(*on_gpu).cpu())
