"""The schema of the models: a section for each family, told apart by `family`.

`needs` names what a family's batches carry, see `neuromamba.models`, and `arrays` where the data
layer keeps that. A model with a `base` shares the pretraining of that model, an `ablation_of` a
model is compared with it on request; both start from the other's settings.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from neuromamba.config.data import Name, Section
from neuromamba.config.training import Finetune, Pretrain

STORES = {"fc": "rois"}
"""The array that holds what a family needs, where it has another name."""


class Family(Section):
    """What the models of all families have in common.

    `forecasts`, `identifies` and `explains` tell of which a study of that name can be made, `pairs`
    which bring two kinds of data together.
    """

    needs: ClassVar[tuple[str, ...]]
    forecasts: ClassVar[bool] = False
    identifies: ClassVar[bool] = True
    explains: ClassVar[bool] = True
    pairs: ClassVar[tuple[str, ...]] = ()

    base: Name | None = None
    ablation_of: Name | None = None
    pretrain: Pretrain = Pretrain()
    finetune: Finetune = Finetune()

    @property
    def arrays(self) -> tuple[str, ...]:
        """The arrays of the data that it reads."""
        return tuple(STORES.get(need, need) for need in self.needs)


class NeuroMamba(Family):
    """Next-patch prediction by Mamba-2 blocks over brain tokens."""

    needs: ClassVar[tuple[str, ...]] = ("tokens",)
    forecasts: ClassVar[bool] = True

    family: Literal["neuromamba"]
    width: PositiveInt = 128
    depth: PositiveInt = 12
    state: PositiveInt = 32
    head_dim: PositiveInt = 64
    expand: PositiveInt = 2
    conv: PositiveInt = 4
    chunk: PositiveInt = 64
    bands: PositiveInt = 10
    volumes: PositiveInt = 20
    normalization: Literal["global", "voxel"] = "global"
    order: Literal["t-fastest", "space-fastest"] = "t-fastest"
    target: Literal["raw", "patch"] = "raw"
    objective: Literal["mse", "mae", "huber"] = "mse"
    parametrization: Literal["mup", "standard"] = "mup"
    base_width: PositiveInt = 128
    checkpoint_blocks: bool = False

    @model_validator(mode="after")
    def _heads_fill_the_width(self) -> NeuroMamba:
        if self.width % 8:
            raise ValueError(f"width ({self.width}) must be a multiple of 8, the pooling's groups")
        if self.expand * self.width % self.head_dim:
            raise ValueError(
                f"expand * width ({self.expand * self.width}) must be a multiple of "
                f"head_dim ({self.head_dim})"
            )
        return self


class RoiModel(Family):
    """What models of ROI series have in common.

    A window is `volumes` long after the series were brought to `repetition_time` (in s; without
    one, they stay as they were scanned), and is cut into patches of `patch` volumes.
    """

    needs: ClassVar[tuple[str, ...]] = ("rois",)

    volumes: PositiveInt = 120
    repetition_time: PositiveFloat | None = 2.0
    patch: PositiveInt = 10
    width: PositiveInt = 64

    @model_validator(mode="after")
    def _patches_fill_the_window(self) -> RoiModel:
        if self.volumes % self.patch:
            raise ValueError(f"volumes ({self.volumes}) must be a multiple of patch ({self.patch})")
        return self


class Lmae(RoiModel):
    """Local masked autoencoder, random-walk mixture of experts, state-space predictor.

    `mask_seconds` is how long a mask in time is, `mask_share` how much of the series the masks
    cover, `mask_rois` the share of regions that are masked for a whole window besides. The graph
    keeps the `neighbors` strongest correlations of each region, with `signed` those that are
    negative as a graph of their own; walks on it take up to `walk_steps` steps. Each ROI and time
    uses `top_k` of the `experts` (all of them without it); without experts there is neither mixture
    nor walk. Walks carry embeddings of the regions, `region_width` wide; what those of up to
    `read_steps` steps find is read, in `maps` weighted sums over the regions, by the predictor.
    `expand` is the inner width of the predictor's layers over `width`, `head_dim` the channels of
    one of their heads.
    """

    family: Literal["lmae"]
    depth: PositiveInt = 2
    mask_seconds: PositiveFloat = 20.0
    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.3
    mask_rois: Annotated[float, Field(ge=0, lt=1)] = 0.0
    neighbors: PositiveInt = 20
    signed: bool = False
    walk_steps: PositiveInt = 3
    experts: Annotated[int, Field(ge=0)] = 4
    top_k: PositiveInt | None = None
    balance: Annotated[float, Field(ge=0)] = 0.01
    region_width: PositiveInt = 128
    maps: PositiveInt = 128
    read_steps: PositiveInt = 1
    predictor: Literal["ssm", "mean", "gru", "attention"] = "ssm"
    predictor_depth: PositiveInt = 1
    state: PositiveInt = 16
    head_dim: PositiveInt = 32
    expand: PositiveInt = 2

    @model_validator(mode="after")
    def _heads_fill_the_width(self) -> Lmae:
        factor = {"ssm": self.expand, "attention": 1}.get(self.predictor)
        if factor is not None and factor * self.width % self.head_dim:
            raise ValueError(
                f"with predictor {self.predictor}, {factor} * width ({self.width}) must be a "
                f"multiple of head_dim ({self.head_dim})"
            )
        return self

    @model_validator(mode="after")
    def _no_more_is_used_than_there_is(self) -> Lmae:
        if self.top_k is not None and self.top_k > self.experts:
            raise ValueError(
                f"top_k ({self.top_k}) is more than there are experts ({self.experts})"
            )
        if self.read_steps > self.walk_steps:
            raise ValueError(
                f"read_steps ({self.read_steps}) is more than the longest walk has "
                f"(walk_steps: {self.walk_steps})"
            )
        return self


class RoiTransformer(RoiModel):
    """Masked autoencoder over patches of ROI series by a Transformer."""

    family: Literal["roi_transformer"]
    depth: PositiveInt = 4
    decoder_depth: PositiveInt = 1
    heads: PositiveInt = 4
    mlp_ratio: PositiveInt = 4
    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.75
    mask: Literal["patches", "times"] = "patches"

    @model_validator(mode="after")
    def _heads_fill_the_width(self) -> RoiTransformer:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        return self


class ImageChanges(Section):
    """Random changes of images in training.

    `flip` is how often left and right are exchanged; `share` how often each of the others happens:
    a factor of 1 +- `scale`, a shift of +- `shift`, and noise with a SD up to `noise`, the latter
    two in units of an image that goes from 0 to 1.
    """

    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.1
    shift: Annotated[float, Field(ge=0)] = 0.1
    noise: Annotated[float, Field(ge=0)] = 0.1


class Cinp(Family):
    """Contrastive image-network pretraining: T1w images and functional connectivity, by subject.

    `width` is that of the embeddings, `feature_size` the channels of the image encoder's first
    stage, `patch` how many voxels of an edge become one of its places, `window` how many places of
    an edge its attention spans, and `image_weights` a file of weights that it starts from.
    `network_*`, `clusters`, `reduced` and `learn_centers` shape the network encoder. `mim` and
    `inm` weigh masked image modelling and the matching of pairs against the contrast (0 leaves them
    out); masks are cubes of `mask_patch` voxels on `mask_share` of an image. `temperature` is where
    the learnable one starts. At most `chunk` samples are encoded at a time, however large the batch
    is that is contrasted. There are no windows, so `volumes` is 0: it reads the connectivity of
    whole runs.
    """

    needs: ClassVar[tuple[str, ...]] = ("fc", "anat")
    identifies: ClassVar[bool] = False
    explains: ClassVar[bool] = False
    pairs: ClassVar[tuple[str, ...]] = ("image", "network")

    family: Literal["cinp"]
    volumes: Literal[0] = 0
    width: PositiveInt = 768
    feature_size: Annotated[int, Field(gt=0, multiple_of=12)] = 48
    patch: PositiveInt = 2
    window: PositiveInt = 7
    image_weights: str | None = None
    network_depth: PositiveInt = 2
    network_heads: PositiveInt = 4
    network_hidden: PositiveInt = 1024
    clusters: PositiveInt = 10
    reduced: PositiveInt = 8
    learn_centers: bool = False
    mim: Annotated[float, Field(ge=0)] = 1.0
    inm: Annotated[float, Field(ge=0)] = 1.0
    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.3
    mask_patch: PositiveInt = 16
    temperature: Annotated[float, Field(ge=0.01)] = 0.07
    chunk: PositiveInt | None = None
    changes: ImageChanges = ImageChanges()

    @model_validator(mode="after")
    def _contrasts_one_batch(self) -> Cinp:
        if self.pretrain.accumulate > 1:
            raise ValueError(
                f"pretrain.accumulate is {self.pretrain.accumulate}, and batches are contrasted "
                "each for itself: raise pretrain.batch_size instead, and set `chunk` to the number "
                "of samples that fit into memory at a time"
            )
        return self


class Tablet(Family):
    """A Transformer over the codes of volumes, pretrained by masked token modelling.

    `heads` share `groups` sets of keys and values; `hidden` is the inner width of a block's
    perceptron. `input` is what is read of a token: its code, or what stays of it in the window and
    what changes, each by a layer of its own (`split`). A token is told by where it stands in the
    sequence (`position: rope`), or by its place in the volume and its volume (`grid`). `readout` is
    what an embedding is: the final state of CLS, or the mean of those of the tokens. In pretraining
    `mask_share` of the tokens are hidden: the same at all times (`tube`), all at some times
    (`time`), or any (`random`). `target` is what is asked for of them: the codes of a token in
    units of itself (`normed`), as they are (`raw`), or their changes in time (`changes`).
    """

    needs: ClassVar[tuple[str, ...]] = ("codes",)
    # A gradient would tell of values of an autoencoder, each of which is of a third of the brain
    # along every axis, and not of places.
    explains: ClassVar[bool] = False

    family: Literal["tablet"]
    volumes: PositiveInt = 256
    width: PositiveInt = 896
    depth: PositiveInt = 12
    heads: PositiveInt = 14
    groups: PositiveInt = 2
    hidden: PositiveInt = 4864
    input: Literal["codes", "split"] = "codes"
    position: Literal["rope", "grid", "none"] = "rope"
    readout: Literal["cls", "mean"] = "cls"
    mask: Literal["tube", "random", "time"] = "tube"
    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    target: Literal["normed", "raw", "changes"] = "normed"
    objective: Literal["mae", "mse"] = "mae"
    checkpoint_blocks: bool = False

    @model_validator(mode="after")
    def _heads_fill_the_width(self) -> Tablet:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width ({self.width}) must be a multiple of 2 * heads ({2 * self.heads}): each "
                "head has an even number of channels, which positions turn in pairs"
            )
        if self.heads % self.groups:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of groups ({self.groups}), which share "
                "keys and values"
            )
        return self


Model = Annotated[NeuroMamba | Lmae | RoiTransformer | Cinp | Tablet, Field(discriminator="family")]
