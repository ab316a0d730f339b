"""The schema of the trainings: pretraining, fine-tuning, and forecasts by what was pretrained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from neuromamba.config.data import Fraction, Name, Section


class Optimiser(Section):
    """AdamW with linear warm-up and cosine decay, shared by pretraining and fine-tuning."""

    steps: PositiveInt
    batch_size: PositiveInt = 4
    accumulate: PositiveInt = 1
    learning_rate: PositiveFloat = 1e-3
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    clip_norm: PositiveFloat = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    log_every: PositiveInt = 10
    validate_every: PositiveInt = 100
    validation_windows: PositiveInt = 1
    checkpoint_every: PositiveInt = 100
    keep_checkpoints: PositiveInt = 2
    keep_every: PositiveInt | None = None
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    spike: Annotated[float, Field(gt=1)] = 10.0
    max_bad_steps: PositiveInt = 10
    max_rollbacks: Annotated[int, Field(ge=0)] = 3

    @property
    def may_keep_start(self) -> bool:
        """Whether the weights before the first step are worth a validation."""
        return False


class Pretrain(Optimiser):
    """Self-supervised training on the subjects of the training part."""

    steps: PositiveInt = 10000
    init_from: str | None = None
    mixture: Name | None = None


class Adapters(Section):
    """Low-rank changes of the linear layers, which learn beside the head and the pooling (LoRA)."""

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0


class Finetune(Optimiser):
    """Supervised training: of the whole model, of adapters in it, of a head, or a linear probe.

    A probe has a convex fit: of the optimiser's settings only `batch_size` counts. A `fresh` start
    is from random weights, to be compared with one from the pretraining.
    """

    steps: PositiveInt = 1000
    start: Literal["pretrained", "fresh"] = "pretrained"
    mode: Literal["full", "adapters", "head", "probe"] = "full"
    adapters: Adapters = Adapters()
    head_start: Literal["zero", "probe"] = "zero"
    head_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    evaluation_windows: PositiveInt = 8

    @property
    def fits_head(self) -> bool:
        """Whether a linear probe is fitted: to end there, or to begin there."""
        return "probe" in (self.mode, self.head_start)

    @property
    def may_keep_start(self) -> bool:
        return self.head_start == "probe"


class Forecast(Section):
    """Forecasts of the test subjects' runs by the pretrained model, fed with its own forecasts."""

    windows: PositiveInt = 4
    context: PositiveInt | None = None
    max_subjects: PositiveInt | None = 50
