"""A head that turns a model's embedding into a prediction, and the losses it learns by.

The head is standardisation -> dropout -> Linear. Embeddings of different people are nearly the same
vector; what tells them apart is a percent of it, and a linear layer would take long to find that.
So each feature is centred and scaled by its mean and SD over windows of the training subjects, as a
linear probe does, once before the first step. These numbers are then fixed: a prediction does not
depend on what else is predicted.

What is said of several windows together is the mean of their probabilities or values. Of a linear
probe, which was fitted to means of features over windows, it is what the head says of such a mean:
of classes, the mean of the logits, which is another thing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from neuromamba.adapters import adapter_rates, merge_adapters
from neuromamba.batches import Batch

HEAD_WIDTH = 128
"""Features up to which a head learns at the full rate; with n times as many, at 1 / n of it.

A step of Adam moves every weight alike, so that what it does to the output grows with the features
(arXiv 2203.03466, section 4, of layers that sum over the width). At one rate for all, a head on
65,000 features was worse than chance on validation subjects after 15 steps (loss 0.76), and in the
end had learnt its training subjects by heart (0.09).
"""


class ClassHead(nn.Module):
    """Loss and probabilities from one output for each class.

    Parameters
    ----------
    weights
        (n_classes,) weight of a sample of each class, with mean 1 over the training subjects.
    """

    weights: torch.Tensor

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.outputs = len(weights)
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32))

    def loss(self, output: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
        # Not the weighted mean of `cross_entropy`, whose scale changes with the batch's classes.
        each = functional.cross_entropy(output, label, reduction="none") * self.weights[label]
        return {"loss": each.mean(), "accuracy": (output.argmax(1) == label).double().mean()}

    def predict(self, output: torch.Tensor) -> torch.Tensor:
        return output.softmax(1)

    def describe(self) -> dict[str, Any]:
        return {"class_weights": self.weights.tolist()}


class NumberHead(nn.Module):
    """Loss and values from one output, in z units of the training subjects.

    Parameters
    ----------
    mean, sd
        Of the target over the training subjects.
    """

    mean: torch.Tensor
    sd: torch.Tensor
    outputs = 1

    def __init__(self, mean: float, sd: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("sd", torch.tensor(sd, dtype=torch.float32))

    def loss(self, output: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
        z = (label - self.mean) / self.sd
        error = output[:, 0] - z
        mse = error.square().mean()
        return {
            "loss": mse,
            "mae": error.abs().mean() * self.sd,
            "mse_model": mse,
            "mse_mean": z.square().mean(),
        }

    def predict(self, output: torch.Tensor) -> torch.Tensor:
        return output * self.sd + self.mean

    def describe(self) -> dict[str, Any]:
        return {"mean": self.mean.item(), "sd": self.sd.item()}


class HeadedModel(nn.Module):
    """A model family with a head for one target: the same `needs` and `loss` as a family.

    Parameters
    ----------
    backbone
        Has `embed(batch)`, (batch, width), and `width`; `pool`, where the embedding has a part that
        is learnt with the head; and `head`, where a part serves the family's own loss alone.
    task
        `ClassHead` or `NumberHead`.
    dropout
        Before the last layer.
    frozen
        Train the head and `backbone.pool` alone (an attentive probe, or a linear one where there
        is no `pool`); the rest of the backbone then works as in evaluation. Adapters in it learn.
    of_means
        The head is, or will be, fitted to means over windows.
    """

    center: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        backbone: nn.Module,
        task: ClassHead | NumberHead,
        dropout: float,
        frozen: bool,
        of_means: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        width = int(backbone.width)  # type: ignore[arg-type]
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        output = nn.Linear(width, task.outputs)
        # The first prediction is then the same for everybody, and no direction is favoured.
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)
        self.head = nn.Sequential(nn.Dropout(dropout), output)
        self.task = task
        self.frozen, self.of_means = frozen, of_means
        self.needs: tuple[str, ...] = backbone.needs  # type: ignore[assignment]
        self.n_rois = int(getattr(backbone, "n_rois", 0))
        self.codes: Mapping[str, Any] | None = getattr(backbone, "codes", None)
        backbone.requires_grad_(not frozen)
        if isinstance(forecast := getattr(backbone, "head", None), nn.Module):
            forecast.requires_grad_(False)
        if isinstance(pool := getattr(backbone, "pool", None), nn.Module):
            pool.requires_grad_(True)

    @torch.no_grad()
    def standardize(self, batches: Iterable[Batch]) -> None:
        """Set the mean and SD of the features from batches of the training subjects."""
        mode = self.training
        self.eval()
        embeddings = torch.cat([self.backbone.embed(batch).float() for batch in batches])  # type: ignore[operator]
        self.train(mode)
        self.standardize_by(embeddings)

    @torch.no_grad()
    def standardize_by(self, embeddings: torch.Tensor) -> None:
        """Set the mean and SD of the features by (sample, width) of the training subjects."""
        self.center.copy_(embeddings.mean(0))
        # A feature that is the same for everybody stays as it is instead of being blown up.
        sd = embeddings.std(0, correction=0)
        self.scale.copy_(torch.where(sd > 1e-6 * embeddings.abs().mean(), sd, 1.0))

    def standardized(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(sample, width) embeddings in float32, centred and scaled, where the model is."""
        return (embeddings.to(self.center.device).float() - self.center) / self.scale

    def merged(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights of this model as they are saved: without adapters, which are merged into them."""
        return merge_adapters(weights)

    def learning_rate_scales(self) -> dict[str, float]:
        """Those of the backbone and of adapters in it, by the names of the parameters here.

        A head that sums over many features learns at a smaller rate (see `HEAD_WIDTH`).
        """
        scales: dict[str, float] = getattr(self.backbone, "learning_rate_scales", dict)()
        scales |= adapter_rates(self.backbone)
        wide = min(1.0, HEAD_WIDTH / len(self.center))
        return {f"backbone.{name}": scale for name, scale in scales.items()} | {
            "head.1.weight": wide
        }

    @property
    def means_logits(self) -> bool:
        """Whether several windows are predicted together by the mean of their logits."""
        return self.of_means and isinstance(self.task, ClassHead)

    def train(self, mode: bool = True) -> HeadedModel:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        return self.task.loss(self._output(self.features(batch)), batch["label"])

    def features(self, batch: Batch) -> torch.Tensor:
        """The standardised embeddings (batch, width) float32, which the head reads."""
        embedding = self.backbone.embed(batch)  # type: ignore[operator]
        with torch.autocast(embedding.device.type, enabled=False):
            return self.standardized(embedding)

    def predict_features(self, features: torch.Tensor) -> torch.Tensor:
        """Probabilities (batch, n_classes), or values (batch, 1) in the target's own units."""
        return self.task.predict(self._output(features))

    def _output(self, features: torch.Tensor) -> torch.Tensor:
        # In float32 also under autocast: the head is small, and the loss needs the digits.
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features)


def make_unscaled(backbone: nn.Module, classes: Sequence[str], of_means: bool) -> HeadedModel:
    """The network of a finished fine-tuning, to load its weights into.

    What its head was scaled by comes with them. Without classes it predicts a number. `of_means`:
    it is a probe.
    """
    task = ClassHead([1.0] * len(classes)) if classes else NumberHead(0.0, 1.0)
    return HeadedModel(backbone, task, 0.0, frozen=True, of_means=of_means)
