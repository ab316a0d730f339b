"""A 3D Swin Transformer of images, as in the self-supervised pretraining of Swin UNETR.

Source: Tang et al. 2022, "Self-Supervised Pre-Training of Swin Transformers for 3D Medical Image
Analysis", arXiv 2111.14791; the encoder itself is MONAI's, so that weights which MONAI publishes
fit. Images of which an edge is no multiple of the patch are padded with zeros at its end, as are
the places of a stage that are to be merged by two. Ours:

- The embedding is a linear map of the mean over the last stage's places.
- The decoder that rebuilds masked voxels from the last stage alone is five transposed convolutions,
  each with half the channels: all that it knows has to go through what the embedding is made of.
  What lies beyond the image is cut off after each.

Dimensions in names: B samples, Z, Y, X voxels, C channels, z, y, x places of the last stage.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

DEPTHS, HEADS = (2, 2, 2, 2), (3, 6, 12, 24)


class SwinImage(nn.Module):
    """Images (B, Z, Y, X) to features of their places, and to embeddings (B, width).

    Parameters
    ----------
    feature_size : int
        Channels of the first stage, a multiple of 12; the last has 16 times as many.
    width : int
        Of the embedding.
    window : int
        Places of an edge of the windows within which attention is; published weights are for 7.
    patch : int
        Voxels of an edge that become one place of the first stage; published weights are for 2. Of
        the last stage there are 16 times as many to a place.
    """

    def __init__(self, feature_size: int, width: int, window: int = 7, patch: int = 2) -> None:
        super().__init__()
        # Loading it takes seconds, which only those who build such a model are to wait for.
        from monai.networks.nets.swin_unetr import SwinTransformer

        self.channels, self.patch = 16 * feature_size, patch
        self.swin = SwinTransformer(
            in_chans=1,
            embed_dim=feature_size,
            window_size=(window,) * 3,
            patch_size=(patch,) * 3,
            depths=DEPTHS,
            num_heads=HEADS,
        )
        self.project = nn.Linear(self.channels, width)

    def forward(self, image_BZYX: Tensor) -> Tensor:
        """Embeddings (B, width) of images, not normalised."""
        return self.embed(self.features(image_BZYX))

    def features(self, image_BZYX: Tensor) -> Tensor:
        """The last stage, (B, C, z, y, x), normalised over its channels."""
        rest = [-edge % self.patch for edge in image_BZYX.shape[1:]]
        padding = [size for after in reversed(rest) for size in (0, after)]
        return self.swin(functional.pad(image_BZYX, padding)[:, None])[-1]

    def embed(self, features_BCzyx: Tensor) -> Tensor:
        """Embeddings (B, width) of what `features` gives."""
        return self.project(features_BCzyx.mean((2, 3, 4)))


class ImageDecoder(nn.Module):
    """Rebuilds images from the last stage of `SwinImage`.

    Parameters
    ----------
    channels : int
        Of the last stage; a multiple of 16.
    patch : int
        That of the encoder.
    """

    def __init__(self, channels: int, patch: int = 2) -> None:
        super().__init__()
        self.patch = patch
        layers: list[nn.Module] = []
        for _ in range(4):
            layers += [
                nn.ConvTranspose3d(channels, channels // 2, 2, stride=2, bias=False),
                nn.InstanceNorm3d(channels // 2),
                nn.LeakyReLU(),
            ]
            channels //= 2
        self.layers = nn.Sequential(*layers, nn.ConvTranspose3d(channels, 1, patch, stride=patch))

    def forward(self, features_BCzyx: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Images (B, Z, Y, X) of that shape."""
        voxels = 16 * self.patch  # of an edge of a place
        images = features_BCzyx
        for layer in self.layers:
            images = layer(images)
            if isinstance(layer, nn.ConvTranspose3d):
                # Beyond the image there is nothing to rebuild; a norm takes two places at least.
                voxels //= layer.stride[0]
                z, y, x = (max(2, -(-edge // voxels)) for edge in shape)
                images = images[:, :, :z, :y, :x]
        return images[:, 0]
