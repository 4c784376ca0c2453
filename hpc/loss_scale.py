"""Dynamic loss scaling: keep float16 gradients in range (Micikevicius et al. 2018, section 3.2)."""

from typing import Any

from preprocessing.errors import InputError

BACKOFF = 0.5
GROWTH = 2.0


class LossScale:
    """The factor on the loss; halved when a gradient overflows, doubled after a quiet while.

    Args:
        initial: first scale.
        window: applied steps in a row after which the scale doubles.
        floor: smallest useful scale.
    """

    def __init__(self, initial: float, window: int, floor: float) -> None:
        self.scale = initial
        self._window = window
        self._floor = floor
        self._applied = 0

    def update(self, applied: bool) -> None:
        """Learn whether a step was applied, or skipped because its gradient overflowed.

        Raises:
            InputError: if the scale falls below its floor.
        """
        if applied:
            self._applied += 1
            if self._applied % self._window == 0:
                self.scale *= GROWTH
            return
        self._applied = 0
        self.scale *= BACKOFF
        if self.scale < self._floor:
            raise InputError(
                f"the loss scale fell below train.min_loss_scale = {self._floor:g}: gradients "
                "overflow whatever the scale, so the model diverges: lower optimizer.lr, raise "
                "schedule.warmup_steps, or use train.precision=bf16; the last checkpoint is sound"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and the steps since it changed."""
        return {"scale": self.scale, "applied": self._applied}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a saved scale."""
        self.scale, self._applied = state["scale"], state["applied"]
