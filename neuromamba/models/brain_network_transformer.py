"""Brain Network Transformer: an encoder of functional connectivity networks.

Source: Kan et al. 2022, "Brain Network Transformer", arXiv 2210.06681. The features of a node are
its row of the connectivity matrix, so that no code of position is needed; layers of multi-head
self-attention (equation 1) mix the nodes, and an orthonormal clustering readout (OCRead, equations
2 to 5) sums them up. What the equations leave open is ours:

- Each attention has a residual path, a layer norm and a perceptron after it, as a layer of a
  Transformer has them and as the authors' own layers do.
- A head has R / heads channels, rounded up, so that any number of regions can be read.
- Cluster centres are drawn once, by Xavier's uniform rule and Gram-Schmidt, and stay as they are
  (`learn_centers` lets them move, and then nothing keeps them orthonormal).
- Each cluster's sum is brought to `reduced` channels before the last perceptron.
- A region that is missing is attended to by none and is no part of the readout.

Dimensions in names: B samples, R regions, F features of a node, H heads, D channels of a head,
K clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from neuromamba.files import InputError


def orthonormal_centers(clusters: int, features: int) -> Tensor:
    """Cluster centres (K, F) float32, drawn by Xavier's uniform rule and made orthonormal.

    Gram-Schmidt, row by row (Kan et al. 2022, equations 4 and 5), computed in float64.

    Raises
    ------
    InputError
        When there are more clusters than features, of which no more can be orthogonal.
    """
    if clusters > features:
        raise InputError(
            f"{clusters} clusters cannot be orthogonal to each other in {features} features: let "
            f"the model have at most {features} `clusters`, the number of regions"
        )
    drawn_KF = nn.init.xavier_uniform_(torch.empty(clusters, features)).double()
    centers: list[Tensor] = []
    for drawn in drawn_KF:
        left = drawn - sum((center @ drawn) * center for center in centers)
        centers.append(left / left.norm())
    return torch.stack(centers).float()


class NodeAttention(nn.Module):
    """Multi-head self-attention of nodes with features (B, R, F).

    Parameters
    ----------
    features : int
        F.
    heads : int
        H.
    """

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        inner = -(-features // heads) * heads
        self.heads = heads
        self.query = nn.Linear(features, inner, bias=False)
        self.key = nn.Linear(features, inner, bias=False)
        self.value = nn.Linear(features, inner, bias=False)
        self.out = nn.Linear(inner, features, bias=False)

    def forward(self, nodes_BRF: Tensor, present_BR: Tensor) -> Tensor:
        query, key, value = (
            layer(nodes_BRF).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        # Whoever has no region at all attends to the first: a softmax over none is no number.
        seen_BR = present_BR.clone()
        seen_BR[:, 0] |= ~present_BR.any(1)
        mixed_BHRD = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen_BR[:, None, None]
        )
        return self.out(mixed_BHRD.transpose(1, 2).flatten(2))


class NodeLayer(nn.Module):
    """Attention and a perceptron of each node, with residual paths and norms after them."""

    def __init__(self, features: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = NodeAttention(features, heads)
        self.perceptron = nn.Sequential(
            nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, features)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(features) for _ in range(2))

    def forward(self, nodes_BRF: Tensor, present_BR: Tensor) -> Tensor:
        mixed = self.norms[0](nodes_BRF + self.attention(nodes_BRF, present_BR))
        return self.norms[1](mixed + self.perceptron(mixed))


class OrthonormalReadout(nn.Module):
    """OCRead: nodes (B, R, F) to clusters (B, K, F), by their likeness to orthonormal centres.

    Parameters
    ----------
    clusters, features : int
        K and F.
    learn_centers : bool
        Let the centres be learnt.
    """

    centers: Tensor

    def __init__(self, clusters: int, features: int, learn_centers: bool) -> None:
        super().__init__()
        centers = orthonormal_centers(clusters, features)
        if learn_centers:
            self.centers = nn.Parameter(centers)
        else:
            self.register_buffer("centers", centers)

    def forward(self, nodes_BRF: Tensor, present_BR: Tensor) -> Tensor:
        # In float32 also under autocast: likeness goes into an exponential.
        with torch.autocast(nodes_BRF.device.type, enabled=False):
            nodes = nodes_BRF.to(self.centers.dtype)
            shares_BRK = (nodes @ self.centers.T).softmax(-1) * present_BR[..., None]
            return shares_BRK.transpose(1, 2) @ nodes


class BrainNetworkTransformer(nn.Module):
    """From connectivity matrices (B, R, R) to embeddings (B, width).

    Parameters
    ----------
    n_rois : int
        Regions, R.
    width : int
        Of the embedding.
    depth, heads, hidden : int
        Layers of attention, heads of one, and the inner width of its perceptron.
    clusters : int
        Of the readout, K; at most R.
    reduced : int
        Channels that are left of each cluster.
    learn_centers : bool
        Whether the centres of the clusters are learnt.

    Raises
    ------
    InputError
        When there are more clusters than regions.
    """

    def __init__(
        self,
        n_rois: int,
        width: int,
        depth: int = 2,
        heads: int = 4,
        hidden: int = 1024,
        clusters: int = 10,
        reduced: int = 8,
        learn_centers: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(NodeLayer(n_rois, heads, hidden) for _ in range(depth))
        self.readout = OrthonormalReadout(clusters, n_rois, learn_centers)
        self.reduce = nn.Sequential(nn.Linear(n_rois, reduced), nn.LeakyReLU())
        self.project = nn.Sequential(
            nn.Linear(clusters * reduced, width), nn.LeakyReLU(), nn.Linear(width, width)
        )

    def forward(self, fc_BRR: Tensor, present_BR: Tensor) -> Tensor:
        """Embed connectivity matrices.

        Parameters
        ----------
        fc_BRR : Tensor, (B, R, R) float32
            Pearson correlations; whatever the rows of missing regions hold has no influence, and
            their columns must be 0.
        present_BR : Tensor, (B, R) bool
            The regions that there are.

        Returns
        -------
        Tensor
            (B, width), not normalised.
        """
        return self.project(self.reduce(self.read(fc_BRR, present_BR)).flatten(1))

    def read(self, nodes_BRF: Tensor, present_BR: Tensor) -> Tensor:
        """What the readout makes of nodes (B, R, F): (B, K, F), whatever their order."""
        for layer in self.layers:
            nodes_BRF = layer(nodes_BRF, present_BR)
        return self.readout(nodes_BRF, present_BR)
