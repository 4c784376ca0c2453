"""What a language model is given, what it must answer, and its loss: masked or next residues.

Randomness is counter-based: each draw is a hash of (seed of the sample, position, draw number),
computed in 64-bit integers. What a sample gets therefore depends on its seed alone: not on the
batch around it, the padding, the device, the number of ranks or the torch version.

Shape suffixes: B batch, L length, V vocabulary.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from models.transformer_xl import Memory

Model = Callable[[Tensor, Tensor | None], Tensor]
"""(tokens_BL, lengths_B or None if nothing is padded) → logits_BLV: a `Bert`, or what wraps it."""

RecurrentModel = Callable[..., tuple[Tensor, Memory]]
"""(tokens_BL, memory or None, longest memory to return) → (logits_BLV, memory): a `TransformerXL`,
or what wraps it."""

_DRAWS_PER_POSITION = 4
_DRAW_TARGET, _DRAW_KIND, _DRAW_RESIDUE, _DRAW_ORDER = range(_DRAWS_PER_POSITION)
_DRAW_BITS = 24
"""Shares and choices compare the top bits of a draw with integers, so that nothing is rounded."""
_NOT_A_TARGET = -100


def masked_lm(
    tokens_BL: Tensor,
    lengths_B: Tensor,
    seeds_B: Tensor,
    *,
    mask_id: int,
    random_ids: tuple[int, ...],
    probability: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Choose targets and hide them (Devlin et al. 2018, section 3.1).

    Each residue, which is every position but the first ([CLS]), the last ([SEP]) and padding, is a
    target with `probability`. A target becomes [MASK] with `mask_share`, a token drawn evenly from
    `random_ids` with `random_share`, and stays as it is otherwise. Which positions are targets
    depends on the seeds and `probability` only, so evaluation (mask_share 1, random_share 0)
    asks for the same ones as training.

    Args:
        tokens_BL: integers, [CLS] residues [SEP] padding.
        lengths_B: integers, tokens of each sample without padding.
        seeds_B: int64, one per sample and epoch, on the device of the tokens.
        mask_id: id of [MASK].
        random_ids: ids that a random replacement is drawn from; 20 amino acids for a protein.
        probability: share of residues that are targets.
        mask_share: share of targets that become [MASK].
        random_share: share of targets that become a random token.

    Returns:
        inputs_BL in the dtype of the tokens, and targets_BL (bool).

    Raises:
        ValueError: if a share is not in [0, 1], if mask_share and random_share exceed 1 together,
            or if there is nothing to draw random tokens from.
    """
    target_limit, mask_limit, random_limit = map(
        _threshold, (probability, mask_share, random_share)
    )
    if mask_limit + random_limit > 1 << _DRAW_BITS:
        raise ValueError(
            f"mask_share {mask_share} and random_share {random_share} exceed 1 together: "
            "lower one of them"
        )
    if random_limit and not random_ids:
        raise ValueError(f"random_share is {random_share} but random_ids is empty: name some ids")
    positions_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
    stream_B = splitmix64(seeds_B)
    drawn_BL = _top_bits(_draw(stream_B, positions_L, _DRAW_TARGET))
    targets_BL = _is_residue(positions_L, lengths_B) & (drawn_BL < target_limit)

    kind_BL = _top_bits(_draw(stream_B, positions_L, _DRAW_KIND))
    inputs_BL = tokens_BL.masked_fill(targets_BL & (kind_BL < mask_limit), mask_id)
    if random_limit:
        drawn_BL = _top_bits(_draw(stream_B, positions_L, _DRAW_RESIDUE))
        ids_R = _on_device(random_ids, tokens_BL.device, tokens_BL.dtype)
        # Multiply and shift: id number ⌊drawn · R / 2^24⌋, even to R / 2^24.
        random_BL = ids_R[(drawn_BL * len(random_ids)) >> _DRAW_BITS]
        is_random_BL = (kind_BL >= mask_limit) & (kind_BL < mask_limit + random_limit)
        inputs_BL = torch.where(targets_BL & is_random_BL, random_BL, inputs_BL)
    return inputs_BL, targets_BL


def shuffle_residues(tokens_BL: Tensor, lengths_B: Tensor, seeds_B: Tensor) -> Tensor:
    """Permute the residues of each sample; [CLS], [SEP] and padding stay where they are.

    A model that scores real proteins no better than these has learned composition, but no order.

    Args:
        tokens_BL: integers, [CLS] residues [SEP] padding.
        lengths_B: integers, tokens of each sample without padding.
        seeds_B: int64, one per sample, on the device of the tokens.

    Returns:
        tokens_BL with the residues of each sample in the order of their hashes.
    """
    positions_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
    # 62-bit hashes, so that what stays in place can sort before and behind every residue.
    hashes_BL = _shift_right(_draw(splitmix64(seeds_B), positions_L, _DRAW_ORDER), 2)
    outside_L = torch.where(positions_L == 0, -1, 1 << 62)
    order_BL = torch.where(_is_residue(positions_L, lengths_B), hashes_BL, outside_L)
    return tokens_BL.gather(1, order_BL.argsort(dim=1, stable=True))


def masked_lm_loss(
    model: Model,
    inputs_BL: Tensor,
    lengths_B: Tensor | None,
    tokens_BL: Tensor,
    targets_BL: Tensor,
) -> Tensor:
    """Return the cross entropy in nats, summed over the targets: a float32 scalar.

    The caller divides by the number of targets of the whole step. Logits are made at every
    position: the head is 1 / (12 · layers) of the model's work (0.3 % of ProtBert's), while picking
    the targets out would make the host wait for the device, and sums on it would lose their order.

    Args:
        model: gives logits_BLV for (inputs_BL, lengths_B).
        inputs_BL: integers, tokens with the targets hidden.
        lengths_B: integers, tokens of each sample without padding; None if nothing is padded.
        tokens_BL: integers, the true tokens.
        targets_BL: bool, True where a token is to be predicted.
    """
    return _losses(model(inputs_BL, lengths_B), tokens_BL, targets_BL).sum()


def masked_lm_scores(
    model: Model,
    inputs_BL: Tensor,
    lengths_B: Tensor | None,
    tokens_BL: Tensor,
    targets_BL: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each sample's scores, for evaluation. The arguments are those of `masked_lm_loss`.

    Returns:
        loss_B (float32, nats, summed over the sample's targets), correct_B (int64, targets whose
        most probable token is the true one) and targets_B (int64, number of targets).
    """
    logits_BLV = model(inputs_BL, lengths_B)
    loss_B = _losses(logits_BLV, tokens_BL, targets_BL).sum(1)
    correct_B = ((logits_BLV.argmax(-1) == tokens_BL) & targets_BL).sum(1)
    return loss_B, correct_B, targets_BL.sum(1)


def next_token_loss(
    model: RecurrentModel, inputs_BL: Tensor, labels_BL: Tensor, memory: Memory | None
) -> tuple[Tensor, Memory]:
    """Return the cross entropy in nats, summed over the segment, and the next segment's memory.

    Args:
        model: gives logits of each next token, and the memory after the segment.
        inputs_BL: integers, a segment of each lane.
        labels_BL: integers, the token that follows each input.
        memory: of what came before the segment; None at the start of the lanes.

    Returns:
        A float32 scalar, which the caller divides by the number of targets of the whole step, and
        the memory.
    """
    logits_BLV, memory = model(inputs_BL, memory)
    return _losses(
        logits_BLV, labels_BL, torch.ones_like(labels_BL, dtype=torch.bool)
    ).sum(), memory


def next_token_scores(
    model: RecurrentModel,
    inputs_BL: Tensor,
    labels_BL: Tensor,
    targets_BL: Tensor,
    *,
    segment_length: int,
    memory_length: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each sample's scores, for evaluation: segment by segment, from an empty memory.

    Args:
        model: see `next_token_loss`; called with the length of the memory that it is to return.
        inputs_BL: integers, whole samples, padded at the end.
        labels_BL: integers, the token that follows each input.
        targets_BL: bool, True where the label counts.
        segment_length: tokens computed at a time.
        memory_length: longest memory; None: that of the model.

    Returns:
        loss_B (float32, nats, summed over the sample's targets), correct_B (int64, targets whose
        most probable token is the true one) and targets_B (int64, number of targets).
    """
    memory: Memory | None = None
    loss_B = inputs_BL.new_zeros(len(inputs_BL), dtype=torch.float32)
    correct_B = inputs_BL.new_zeros(len(inputs_BL), dtype=torch.int64)
    columns = (inputs_BL, labels_BL, targets_BL)
    for inputs_BS, labels_BS, targets_BS in zip(
        *(tensor.split(segment_length, dim=1) for tensor in columns), strict=True
    ):
        logits_BSV, memory = model(inputs_BS, memory, memory_length)
        loss_B = loss_B + _losses(logits_BSV, labels_BS, targets_BS).sum(1)
        correct_B = correct_B + ((logits_BSV.argmax(-1) == labels_BS) & targets_BS).sum(1)
    return loss_B, correct_B, targets_BL.sum(1)


def splitmix64(state: Tensor) -> Tensor:
    """Return the next output of a SplitMix64 generator in each state, as int64 bit patterns.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"; the
    constants are those of java.util.SplittableRandom. int64 arithmetic wraps around, so its low
    64 bits equal those of the unsigned original.

    Args:
        state: int64, any shape.
    """
    state = state + _GOLDEN_GAMMA
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >= 1 << 63 else bits


_GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    # `>>` copies the sign bit into the top; the mask clears it, as an unsigned shift would.
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _draw(stream_B: Tensor, positions_L: Tensor, draw: int) -> Tensor:
    """Return int64 [B, L]: one output of each sample's generator for a position and draw."""
    count_L = positions_L * _DRAWS_PER_POSITION + draw
    return splitmix64(stream_B[:, None] + count_L * _GOLDEN_GAMMA)


def _top_bits(bits: Tensor) -> Tensor:
    return _shift_right(bits, 64 - _DRAW_BITS)


def _threshold(share: float) -> int:
    if not 0 <= share <= 1:
        raise ValueError(f"a share of {share} was asked for: shares are from 0 to 1")
    return round(share * (1 << _DRAW_BITS))


def _is_residue(positions_L: Tensor, lengths_B: Tensor) -> Tensor:
    return (positions_L > 0) & (positions_L < lengths_B[:, None] - 1)


@cache
def _on_device(ids: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    # Kept, because a copy from the host makes it wait for the device.
    return torch.tensor(ids, device=device, dtype=dtype)


def _losses(logits_BLV: Tensor, tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
    """Return float32 [B, L]: the cross entropy in nats at targets, 0 elsewhere."""
    labels_BL = tokens_BL.long().masked_fill(~targets_BL, _NOT_A_TARGET)
    loss_N = F.cross_entropy(
        logits_BLV.flatten(0, 1).float(),
        labels_BL.flatten(),
        ignore_index=_NOT_A_TARGET,
        reduction="none",
    )
    return loss_N.view_as(labels_BL)
