"""What a model has learned, measured on held-out proteins.

Unigram entropy is the wrong bar: a model that knows only residue frequencies and the masking rule
can pass it. So every target is shown as [MASK], or is the next residue of a model that reads from
left to right; and the loss is set beside the loss on the same proteins with their residues
shuffled, which keeps composition and length and destroys order: learned = shuffled − real, in nats
a residue.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from hpc.config import EvaluationConfig
from hpc.data import PAD_MULTIPLE, Batcher, MicroBatch
from hpc.engines import Engine
from hpc.tasks import Task
from models.objectives import shuffle_residues


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation; losses in nats per target."""

    loss: float
    """On held-out proteins."""
    loss_shuffled: float
    """On the same proteins, residues shuffled."""
    learned: float
    """`loss_shuffled - loss`: what the order of residues tells the model."""
    learned_se: float
    """Standard error of `learned` over proteins."""
    accuracy: float
    """Share of targets predicted right."""
    proteins: int
    targets: int

    def metrics(self) -> dict[str, float]:
        """Return the figures under the names that the log uses."""
        return {f"eval/{name}": value for name, value in asdict(self).items()}


class HeldOut:
    """The held-out split, cut into batches once; the same batches for any number of ranks.

    Args:
        batcher: reads the held-out records.
        records: held-out records there are.
        config: how many are used, and how many at a time.
        task: chooses the targets.
    """

    def __init__(
        self, batcher: Batcher, records: int, config: EvaluationConfig, task: Task
    ) -> None:
        numbers = np.arange(min(records, config.records))
        lengths = batcher.lengths(numbers)
        order = np.argsort(lengths, kind="stable")
        starts = range(0, len(numbers), config.micro_batch)
        self._batches = [numbers[order[s : s + config.micro_batch]] for s in starts]
        self._longest = [int(lengths[batch].max()) for batch in self._batches]
        self._batcher = batcher
        self._task = task
        self.proteins = len(numbers)

    def evaluate(
        self, engine: Engine, should_stop: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """Evaluate on all ranks together; each computes every world-size-th batch.

        ZeRO 3 gathers weights from all ranks whenever a layer is computed. So all ranks compute as
        many batches, in a round of equal width, even if the last round has none left for some.

        Args:
            engine: computes and distributes.
            should_stop: asked before every batch; where any rank's says yes, all give up.

        Returns:
            The evaluation; None if they gave up.
        """
        sums = np.zeros((self.proteins, 4))
        rank, size = engine.world.rank, engine.world.size
        for first in range(0, len(self._batches), size):
            (stops,) = engine.sum_over_ranks([float(should_stop())])
            if stops:
                return None
            place = min(first + rank, len(self._batches) - 1)
            numbers = self._batches[place]
            batch = self._batch(numbers, max(self._longest[first : first + size]))
            real = self._protein_sums(engine, batch)
            shuffled = self._protein_sums(engine, _shuffled(batch))
            if place == first + rank:
                sums[numbers, :3] = real
                sums[numbers, 3] = shuffled[:, 0]
        total = np.reshape(engine.sum_over_ranks(sums.ravel().tolist()), sums.shape)
        return summarise(total[:, 0], total[:, 3], total[:, 1], total[:, 2])

    def _batch(self, numbers: np.ndarray, width: int) -> MicroBatch:
        """Read a batch and pad it to `width` tokens, as batches are padded."""
        width = -(-width // PAD_MULTIPLE) * PAD_MULTIPLE
        samples = self._batcher.read(numbers, np.zeros(len(numbers), np.int64))
        batch = self._batcher.pad(-1, samples)
        return replace(batch, tokens=F.pad(batch.tokens, (0, width - batch.tokens.shape[1])))

    def _protein_sums(self, engine: Engine, batch: MicroBatch) -> np.ndarray:
        """float64 [B, 3]: loss, correct predictions and targets of each protein."""
        prepared = self._task.question(batch).to(engine.device)
        scores = engine.compute(self._task.scores, prepared)
        return torch.stack([column.double() for column in scores], dim=1).cpu().numpy()


def summarise(
    loss: Sequence[float] | np.ndarray,
    loss_shuffled: Sequence[float] | np.ndarray,
    correct: Sequence[float] | np.ndarray,
    targets: Sequence[float] | np.ndarray,
) -> Evaluation:
    """Return the figures from sums per protein, each [N].

    `learned` is a ratio of sums over proteins, so its standard error is that of a ratio estimate
    (Cochran, Sampling Techniques, 3rd ed., eq. 2.46): proteins are the sampling unit, not residues,
    since residues of one protein are not independent.
    """
    loss, loss_shuffled = np.asarray(loss), np.asarray(loss_shuffled)
    correct, targets = np.asarray(correct), np.asarray(targets)
    count, total = len(targets), float(targets.sum())
    gains = loss_shuffled - loss
    learned = float(gains.sum()) / total
    residuals = gains - learned * targets
    spread = count / max(1, count - 1) * float((residuals**2).sum())
    return Evaluation(
        loss=float(loss.sum()) / total,
        loss_shuffled=float(loss_shuffled.sum()) / total,
        learned=learned,
        learned_se=math.sqrt(spread) / total,
        accuracy=float(correct.sum()) / total,
        proteins=count,
        targets=int(total),
    )


def _shuffled(batch: MicroBatch) -> MicroBatch:
    return replace(batch, tokens=shuffle_residues(batch.tokens, batch.lengths, batch.seeds))
