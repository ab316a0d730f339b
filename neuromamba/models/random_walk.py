"""Random walks on the functional connectivity of a window, and a mixture of experts on them.

Sources: the walk is the Markov chain of a weighted graph (L. Lovasz, "Random walks on graphs: a
survey", 1993, section 1); the gated sum of experts and the penalty of its imbalance are those of
N. Shazeer et al. (2017), arXiv 1701.06538, equations 1, 6 and 7.

Dimensions in names: B samples, R ROIs, L volumes, T time patches, C channels, E experts, F features
of time, W features of walks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuromamba.models.roi_layers import TIME_FEATURES

EPSILON = 1e-6


def correlation(series_BRL: Tensor, visible_BRL: Tensor) -> Tensor:
    """Pearson correlations over the volumes that are visible in both ROIs: (B, R, R).

    Each ROI is centred on the mean of all its visible volumes. Where everything is visible, these
    are the correlations of the whole window. A pair that is never visible together, or of which one
    does not vary, has 0. The gradient is that of the equation.
    """
    visible = visible_BRL.to(series_BRL.dtype)
    count = visible.sum(-1, keepdim=True).clamp(min=1)
    seen = series_BRL * visible
    centred = (seen - seen.sum(-1, keepdim=True) / count) * visible
    covariance = centred @ centred.transpose(1, 2)
    # [i, j]: the sum of squares of i where j is visible.
    squares = centred.square() @ visible.transpose(1, 2)
    return covariance * (squares * squares.transpose(1, 2)).clamp(min=EPSILON).rsqrt()


def strongest(weight_BRR: Tensor, neighbors: int) -> Tensor:
    """Of each row the `neighbors` largest weights above 0, and 0 for the rest.

    The choice has no gradient, the weights that are kept have.
    """
    neighbors = min(neighbors, weight_BRR.shape[-1])
    least = weight_BRR.detach().topk(neighbors, dim=-1).values[..., -1:]
    return torch.where(weight_BRR >= least.clamp(min=EPSILON), weight_BRR, 0.0)


def transitions(
    correlation_BRR: Tensor,
    usable_BR: Tensor,
    affinity_RR: Tensor,
    neighbors: int,
    signed: bool,
) -> list[Tensor]:
    """Matrices of the probability of a step from each ROI to each other one.

    Parameters
    ----------
    correlation_BRR : Tensor
    usable_BR : Tensor, bool
        ROIs that a step may lead to.
    affinity_RR : Tensor
        Logits of the steps from a ROI that correlates with none, such as one that is masked from
        end to end.
    neighbors : int
        Steps that are possible from each ROI: to those of the strongest correlation. None leads
        to where it started.
    signed : bool
        Give a graph of the negative correlations too.

    Returns
    -------
    list of Tensor, each (B, R, R)
        Of the positive correlations, then with `signed` of the negative ones, in which a ROI
        without any has a row of zeros; all other rows sum to 1, if there is a usable ROI.
    """
    itself = torch.eye(correlation_BRR.shape[-1], dtype=torch.bool, device=correlation_BRR.device)
    possible_BRR = usable_BR[:, None, :] & ~itself
    correlation_BRR = torch.where(possible_BRR, correlation_BRR, 0.0)
    graphs = [correlation_BRR, -correlation_BRR] if signed else [correlation_BRR]
    weights = [strongest(graph, neighbors) for graph in graphs]
    found = [weight / weight.sum(-1, keepdim=True).clamp(min=EPSILON) for weight in weights]
    sample, roi = (weights[0].detach().sum(-1) == 0).nonzero(as_tuple=True)
    logits = affinity_RR[roi].masked_fill(~possible_BRR[sample, roi], torch.finfo().min)
    rows = logits.softmax(-1) * possible_BRR[sample, roi]
    found[0] = found[0].index_put((sample, roi), rows.to(found[0].dtype))
    return found


def walk(transitions_BRR: list[Tensor], features_BRX: Tensor, steps: int) -> list[Tensor]:
    """What a walker expects to find after 1 .. `steps` steps from each ROI, on each graph.

    P x, P^2 x, ... by repeated products with the features, never of the matrices.
    """
    found = []
    for transition in transitions_BRR:
        features = features_BRX
        for _ in range(steps):
            features = transition @ features
            found.append(features)
    return found


class RandomWalkExperts(nn.Module):
    """A mixture of experts over the states of ROIs and of those that walks from them reach.

    An expert is a perceptron with one hidden layer as wide as the states. Its input are the states
    (h, P h, P^2 h, ...) and the walk vectors (P e, P^2 e, ..., with learned embeddings e of the
    ROIs), which tell how the ROI is connected in this window. The gate reads the state, the ROI's
    embedding, its walk vectors and the time. All experts are computed: a mixture in which each ROI
    and time uses `top_k` of them is sparse, but no faster.

    Parameters
    ----------
    width, region_width : int
        Channels of the states, and of the ROIs' embeddings.
    walks : int
        Graphs times steps of `walk`.
    experts : int
    top_k : int or None
        How many experts of the largest gate are used; `None` is all.
    """

    def __init__(
        self, width: int, region_width: int, walks: int, experts: int, top_k: int | None
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate_state = nn.Linear(width, experts)
        self.gate_roi = nn.Linear((1 + walks) * region_width, experts, bias=False)
        self.gate_time = nn.Linear(TIME_FEATURES, experts, bias=False)
        self.states = nn.Linear((1 + walks) * width, experts * width)
        self.vectors = nn.Linear(walks * region_width, experts * width, bias=False)
        self.out = nn.Linear(experts * width, width, bias=False)
        self.out_bias = nn.Parameter(torch.zeros(experts, width))

    def forward(
        self,
        h_BRTC: Tensor,
        reached_BRTC: list[Tensor],
        embedding_RC: Tensor,
        vectors_BRW: Tensor,
        time_BTF: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The mixture (B, R, T, C), and the weights of the experts (B, R, T, E) in float32."""
        gates_BRTE = self.gate(h_BRTC, embedding_RC, vectors_BRW, time_BTF)
        hidden = self.states(torch.cat([h_BRTC, *reached_BRTC], dim=-1))
        hidden = F.gelu(hidden + self.vectors(vectors_BRW)[:, :, None])
        weights = gates_BRTE.to(hidden.dtype)
        hidden = hidden.unflatten(-1, (weights.shape[-1], -1)) * weights[..., None]
        return self.out(hidden.flatten(-2)) + weights @ self.out_bias.to(hidden.dtype), gates_BRTE

    def gate(
        self, h_BRTC: Tensor, embedding_RC: Tensor, vectors_BRW: Tensor, time_BTF: Tensor
    ) -> Tensor:
        """Weights of the experts, which sum to 1: (B, R, T, E) float32."""
        each_BRC = embedding_RC.expand(len(h_BRTC), -1, -1)
        roi_BRE = self.gate_roi(torch.cat([each_BRC, vectors_BRW], dim=-1))
        logits = self.gate_state(h_BRTC) + roi_BRE[:, :, None] + self.gate_time(time_BTF)[:, None]
        logits = logits.float()
        if self.top_k is not None:
            least = logits.detach().topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        return logits.softmax(-1)


def imbalance(gates_BRTE: Tensor, present_BR: Tensor) -> Tensor:
    """How unequally the experts are used: the mean over samples of a squared variation, >= 0.

    The squared coefficient of variation of the experts' importances (arXiv 1701.06538, equations 6
    and 7); an importance is the sum of an expert's weights over a sample's ROIs and times. 0 where
    all experts are used alike, experts - 1 where one does everything.
    """
    weights = gates_BRTE * present_BR[:, :, None, None]
    importance_BE = weights.sum((1, 2))
    importance_BE = importance_BE / importance_BE.sum(-1, keepdim=True).clamp(min=EPSILON)
    experts = gates_BRTE.shape[-1]
    return (experts * importance_BE - 1).square().mean(-1).mean()
