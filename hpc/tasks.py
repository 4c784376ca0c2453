"""What a model learns: from a micro-batch to inputs, targets and loss sums.

A task hands out loss *sums* and target *counts*, one pair per objective. The trainer divides by
the counts of the whole global step, so the loss does not depend on how ranks share it.
Tensors carry shape suffixes: B sequences, L tokens.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from hpc.config import NextResidueConfig, ObjectiveConfig, Recipe
from hpc.data import MicroBatch
from hpc.lane_memory import LaneMemory
from hpc.lanes import LaneBatch
from models.bert import Bert
from models.objectives import (
    masked_lm,
    masked_lm_loss,
    masked_lm_scores,
    next_token_loss,
    next_token_scores,
)
from models.transformer_xl import TransformerXL, TransformerXLConfig
from preprocessing.vocabulary import Vocabulary

Scores = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of each sample: loss summed over targets, targets predicted right, targets."""


@dataclass(frozen=True)
class PreparedBatch:
    """A micro-batch with its objective's inputs and targets."""

    stream: int
    inputs: torch.Tensor
    """int64 [B, L]: what the model sees."""
    lengths: torch.Tensor | None
    """int64 [B]: tokens of each sequence; None if none is padded."""
    tokens: torch.Tensor
    """int64 [B, L]: the truth at each position of the output."""
    targets: torch.Tensor
    """bool [B, L]: where the truth is to be predicted."""
    counts: dict[str, int]
    """Targets of each objective."""
    real_tokens: int
    """Tokens that are no padding."""

    def to(self, device: torch.device) -> "PreparedBatch":
        """Return the batch on `device`."""
        if device.type == "cpu":
            return self

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return replace(
            self,
            inputs=move(self.inputs),
            lengths=None if self.lengths is None else move(self.lengths),
            tokens=move(self.tokens),
            targets=move(self.targets),
        )


class Task(Protocol):
    """What trainer and evaluation ask of a task."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of its loss sums and target counts."""
        ...

    @property
    def memory(self) -> LaneMemory | None:
        """What lanes remember between segments, of a model with memory."""
        ...

    def prepare(self, batch: Any) -> PreparedBatch:
        """Return a training batch with its targets."""
        ...

    def loss_sums(self, model: Any, batch: PreparedBatch) -> dict[str, torch.Tensor]:
        """Return the float32 loss summed over the batch's targets, in nats, per objective."""
        ...

    def question(self, batch: MicroBatch) -> PreparedBatch:
        """Return held-out proteins as evaluation shows them, with its targets: residues only."""
        ...

    def scores(self, model: Any, batch: PreparedBatch) -> Scores:
        """Return each protein's scores on a batch of `question`."""
        ...


def build_task(recipe: Recipe, vocabulary: Vocabulary) -> Task:
    """Return the task of a recipe.

    Args:
        recipe: names the objective and its options.
        vocabulary: of the model.
    """
    if isinstance(recipe.objective, NextResidueConfig):
        return NextResidue(recipe)
    return MaskedLanguageModel(recipe.objective, vocabulary)


class MaskedLanguageModel:
    """BERT's objective: predict the residues chosen as targets.

    Args:
        config: shares of targets, and of what is shown in their place.
        vocabulary: of the model.
    """

    objectives = ("mlm",)
    memory = None

    def __init__(self, config: ObjectiveConfig, vocabulary: Vocabulary) -> None:
        self._probability = config.probability
        self._mask_share = config.mask_share
        self._random_share = config.random_share
        self._mask_id = vocabulary.id_of(vocabulary.mask)
        self._random_ids = vocabulary.amino_acid_ids()

    def prepare(self, batch: MicroBatch, *, all_masked: bool = False) -> PreparedBatch:
        """Choose targets, the same ones whenever the batch's seeds are the same.

        Args:
            batch: token ids.
            all_masked: show every target as [MASK], as evaluation does.
        """
        tokens_BL = batch.tokens.long()
        inputs_BL, targets_BL = masked_lm(
            tokens_BL,
            batch.lengths,
            batch.seeds,
            mask_id=self._mask_id,
            random_ids=self._random_ids,
            probability=self._probability,
            mask_share=1.0 if all_masked else self._mask_share,
            random_share=0.0 if all_masked else self._random_share,
        )
        padded = bool((batch.lengths < tokens_BL.shape[1]).any())
        return PreparedBatch(
            stream=batch.stream,
            inputs=inputs_BL,
            lengths=batch.lengths if padded else None,
            tokens=tokens_BL,
            targets=targets_BL,
            counts={"mlm": int(targets_BL.sum())},
            real_tokens=int(batch.lengths.sum()),
        )

    def loss_sums(self, model: Bert, batch: PreparedBatch) -> dict[str, torch.Tensor]:
        """Return the float32 loss summed over the batch's targets, in nats, per objective."""
        loss = masked_lm_loss(model, batch.inputs, batch.lengths, batch.tokens, batch.targets)
        return {"mlm": loss}

    def question(self, batch: MicroBatch) -> PreparedBatch:
        """See `Task.question`: every target is shown as [MASK]."""
        return self.prepare(batch, all_masked=True)

    def scores(self, model: Bert, batch: PreparedBatch) -> Scores:
        """See `Task.scores`."""
        return masked_lm_scores(model, batch.inputs, batch.lengths, batch.tokens, batch.targets)


class NextResidue:
    """Transformer-XL's objective: predict every token from those before it.

    Args:
        recipe: lengths of segments and memories, and what checkpoints keep of them.
    """

    objectives = ("lm",)

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.model, TransformerXLConfig)  # the recipe has seen to it
        self.memory = LaneMemory(
            recipe.checkpoint.memory, recipe.model.memory_length, recipe.data.length
        )
        self._segment_length = recipe.data.length
        self._evaluation_memory = recipe.evaluation.memory_length

    def prepare(self, batch: LaneBatch) -> PreparedBatch:
        """See `Task.prepare`: separators are targets, too."""
        tokens = batch.tokens.long()
        inputs_BL, labels_BL = tokens[:, :-1], tokens[:, 1:]
        count = labels_BL.numel()
        return PreparedBatch(
            stream=batch.stream,
            inputs=inputs_BL,
            lengths=None,
            tokens=labels_BL,
            targets=torch.ones_like(labels_BL, dtype=torch.bool),
            counts={"lm": count},
            real_tokens=count,
        )

    def loss_sums(self, model: TransformerXL, batch: PreparedBatch) -> dict[str, torch.Tensor]:
        """See `Task.loss_sums`: what the stream's lanes remember goes in, and is replaced."""
        before = self.memory.of(batch.stream)
        loss, after = next_token_loss(model, batch.inputs, batch.tokens, before)
        self.memory.put(batch.stream, after, batch.inputs)
        return {"lm": loss}

    def question(self, batch: MicroBatch) -> PreparedBatch:
        """See `Task.question`: whole proteins, a separator before each."""
        tokens = batch.tokens.long()
        inputs_BL, labels_BL = tokens[:, :-1], tokens[:, 1:]
        positions_L = torch.arange(labels_BL.shape[1])
        targets_BL = positions_L < batch.lengths[:, None] - 2
        return PreparedBatch(
            stream=batch.stream,
            inputs=inputs_BL,
            lengths=None,
            tokens=labels_BL,
            targets=targets_BL,
            counts={"lm": int(targets_BL.sum())},
            real_tokens=int(batch.lengths.sum()),
        )

    def scores(self, model: TransformerXL, batch: PreparedBatch) -> Scores:
        """See `Task.scores`: segment by segment, from an empty memory."""
        return next_token_scores(
            model,
            batch.inputs,
            batch.tokens,
            batch.targets,
            segment_length=self._segment_length,
            memory_length=self._evaluation_memory,
        )
