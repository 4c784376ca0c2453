"""`prothpc`, but the loss of one micro-batch on the last rank overflows at given steps.

python overflow_program.py 3,4 train RECIPE …
"""

import os
import sys

from hpc import cli
from hpc.tasks import MaskedLanguageModel

steps = {int(step) for step in sys.argv.pop(1).split(",")}
rank, size = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
honest = MaskedLanguageModel.loss_sums
calls = 0


def loss_sums(self, model, batch):
    global calls
    sums = honest(self, model, batch)
    step = calls // (4 // size) + 1  # the recipe has four micro-batches a step
    calls += 1
    broken = step in steps and rank == size - 1
    return {name: value * float("inf") if broken else value for name, value in sums.items()}


MaskedLanguageModel.loss_sums = loss_sums
cli.main()
