"""What a model learns: from a micro-batch to inputs, targets and loss sums.

A task hands out loss *sums* and target *counts*, one pair per objective. The trainer divides by
the counts of the whole global step, so the loss does not depend on how ranks share it.
Tensors carry shape suffixes: B sequences, L tokens.
"""

from dataclasses import dataclass, replace

import torch

from hpc.config import ObjectiveConfig
from hpc.data import MicroBatch
from models.bert import Bert
from models.objectives import masked_lm, masked_lm_loss
from preprocessing.vocabulary import Vocabulary


@dataclass(frozen=True)
class PreparedBatch:
    """A micro-batch with its objective's inputs and targets."""

    stream: int
    inputs: torch.Tensor
    """int64 [B, L]: what the model sees."""
    lengths: torch.Tensor | None
    """int64 [B]: tokens of each sequence; None if none is padded."""
    tokens: torch.Tensor
    """int64 [B, L]: the truth."""
    targets: torch.Tensor
    """bool [B, L]: which tokens are to be predicted."""
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


class MaskedLanguageModel:
    """BERT's objective: predict the residues chosen as targets.

    Args:
        config: shares of targets, and of what is shown in their place.
        vocabulary: of the model.
    """

    objectives = ("mlm",)

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
