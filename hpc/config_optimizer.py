"""Recipe sections of the optimiser and of the learning rate.

Some options have a default that depends on another option, or apply only with some of its values.
They are None until `__post_init__` gives them their value; where they do not apply they stay so.
"""

from dataclasses import dataclass
from typing import Any, Literal

from hpc.lamb import VARIANTS

_DEPENDS: Any = None
"""Default of an option whose real default depends on another option."""

ScheduleName = Literal["constant", "linear", "cosine", "polynomial", "inverse-sqrt", "plateau"]

_ADAMW_EPS = 1e-8  # torch.optim.AdamW
_ADAMW_CLIP_NORM = 1.0  # BERT's published optimiser


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) or LAMB, without decay on biases and layer norms."""

    name: Literal["adamw", "lamb"] = "adamw"
    """Optimiser."""
    variant: Literal["txl", "apex", "deepspeed", "you2020"] = _DEPENDS
    """Whose LAMB; `hpc/lamb.py` has the table. LAMB has no default: they differ."""
    lr: float
    """Learning rate after warm-up."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = _DEPENDS
    """Added to the root of the second moment; 1e-8 for AdamW, that of the variant for LAMB."""
    weight_decay: float = 0.01
    """Decoupled decay of matrices and embeddings."""
    clip_norm: float = _DEPENDS
    """Largest norm of the whole gradient, inf: no clipping; 1 for AdamW and `apex`, else inf."""
    use_nvlamb: bool = _DEPENDS
    """`apex` only: trust ratios also for biases and norms, which do not decay; false by default."""

    def __post_init__(self) -> None:
        if self.name == "adamw":
            _set_defaults(self, eps=_ADAMW_EPS, clip_norm=_ADAMW_CLIP_NORM)
            _refuse(self, "name", ("variant", "use_nvlamb"), 'set name = "lamb" with it')
        elif self.variant is None:
            raise ValueError(
                'name = "lamb" needs a variant, as programs differ in what they call LAMB: add '
                f"variant = one of {', '.join(VARIANTS)}"
            )
        else:
            rules = VARIANTS[self.variant]
            _set_defaults(self, eps=rules.eps, clip_norm=rules.clip_norm)
            if self.variant == "apex":
                _set_defaults(self, use_nvlamb=False)
            else:
                _refuse(self, "variant", ("use_nvlamb",), 'set variant = "apex" with it')
        if self.variant == "apex" and not self.weight_decay and not self.use_nvlamb:
            raise ValueError(
                'variant = "apex" with weight_decay = 0 has no trust ratio anywhere: it is '
                'plain Adam: set use_nvlamb = true, or choose variant = "txl" or name = "adamw"'
            )
        for name in ("lr", "eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be greater than 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} is not in [0, 1)")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay = {self.weight_decay} is negative")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the optimiser steps that were applied."""

    name: ScheduleName = "linear"
    """What the rate does after warm-up."""
    warmup_steps: int = 0
    """Steps of linear rise from zero."""
    warmup_epochs: float = 0.0
    """The same in epochs; an epoch is training records / global_batch steps."""
    final_ratio: float = _DEPENDS
    """Linear, cosine, polynomial: rate after the last step, as a share of the peak; 0."""
    power: float = _DEPENDS
    """Polynomial: the rate falls with (share of steps left) ^ power; 1."""
    factor: float = _DEPENDS
    """Plateau: the rate is multiplied by this; 0.1."""
    patience: int = _DEPENDS
    """Plateau: observations without a lower loss after which the rate falls; 10."""
    min_lr: float = _DEPENDS
    """Plateau: the rate does not fall below this; 0."""
    watch: Literal["training", "held-out"] = _DEPENDS
    """Plateau: the loss observed, of training or at each evaluation; training."""
    window: int = _DEPENDS
    """Plateau on the training loss: steps averaged to one observation; 100."""

    def __post_init__(self) -> None:
        falling = ("linear", "cosine", "polynomial")
        if self.name in falling:
            _set_defaults(self, final_ratio=0.0)
        else:
            _refuse(self, "name", ("final_ratio",), f"choose name = one of {', '.join(falling)}")
        if self.name == "polynomial":
            _set_defaults(self, power=1.0)
        else:
            _refuse(self, "name", ("power",), 'choose name = "polynomial"')
        if self.name == "plateau":
            # Keras's ReduceLROnPlateau, which ProteinBERT's published code calls.
            _set_defaults(self, factor=0.1, patience=10, min_lr=0.0, watch="training")
            self._check_plateau()
        else:
            options = ("factor", "patience", "min_lr", "watch", "window")
            _refuse(self, "name", options, 'choose name = "plateau"')
        for name in ("warmup_steps", "warmup_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} is negative")
        if self.warmup_steps and self.warmup_epochs:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} and warmup_epochs = {self.warmup_epochs} both "
                "set the warm-up: give one of them, and 0 for the other"
            )
        if self.final_ratio is not None and not 0 <= self.final_ratio <= 1:
            raise ValueError(f"final_ratio = {self.final_ratio} is not in [0, 1]")
        if self.power is not None and not self.power > 0:
            raise ValueError(f"power = {self.power} must be greater than 0")

    def _check_plateau(self) -> None:
        if self.watch == "training":
            _set_defaults(self, window=100)
        else:
            _refuse(self, "watch", ("window",), 'choose watch = "training"')
        if not 0 < self.factor < 1:
            raise ValueError(f"factor = {self.factor} is not between 0 and 1")
        if self.patience < 1 or (self.watch == "training" and self.window < 1):
            raise ValueError(f"patience = {self.patience} and window must be 1 or more")
        if self.min_lr < 0:
            raise ValueError(f"min_lr = {self.min_lr} is negative")


def _set_defaults(config: object, **defaults: Any) -> None:
    """Give a frozen dataclass the options that the recipe leaves out."""
    for name, value in defaults.items():
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)


def _refuse(config: object, chooser: str, options: tuple[str, ...], advice: str) -> None:
    """Refuse options that `chooser`, as it is set, would ignore."""
    for option in options:
        if getattr(config, option) is not None:
            raise ValueError(
                f"{option} = {getattr(config, option)!r} does not apply to "
                f"{chooser} = {getattr(config, chooser)!r}: leave it out, or {advice}"
            )
