"""The score predictor of Qua2SeDiMo: a graph neural network that learns from measured configurations.

The network reads a configuration (a format for every layer) on the dependency graph and predicts the quality of the
output. Its training also makes the norms of its embeddings rank the configurations, hop by hop. The norm of one node's
embedding after m layers then scores the unit of layers that reaches the node in m steps, by itself (arXiv 2412.14628,
section 3.2; features, sizes and losses are those of its released code). It needs nothing but torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from mpq_compiler.allocation.qua2sedimo.graph import Graph, Unit, by_path, neighbours, units

EMBEDDING, WIDE, NODE = 5, 10, 16
"""The widths of the embeddings of a node's format, of its place, and of the whole node before any attention."""
HIDDEN = 32
"""The width of the embeddings after an attention."""
SLOPE = 0.2
"""The negative slope of the leaky ReLU in the attention."""
MOST = 50.0
"""The relevance of the best configuration, from 0 for the worst fifth (`relevance`)."""
PLACES = 512
"""The places of a ranking that its gain counts (NDCG)."""
TEMPERATURE = 0.3
"""The temperature of the sigmoids that count ranks, in standard deviations."""
DIGITS = 6
"""The significant digits of a score in JSON."""


@dataclass(frozen=True)
class Training:
    """Hyperparameters of the training: AdamW with a cosine schedule, one predictor for each fold of the data."""

    folds: int = 5
    epochs: int = 60
    batch: int = 60
    rate: float = 3e-3
    decay: float = 1e-4
    clip: float = 5.0
    ranks: float = 1.0
    """The weight of the rank loss, relative to the squared error of the prediction."""
    ranking: str = "spearman"
    """What the rank loss is of: ``spearman``, ``ndcg`` or both (``hybrid``)."""


@dataclass(frozen=True)
class Features:
    """Features of the formats that a layer can have."""

    formats: tuple[str, ...]
    kinds: tuple[int, ...]
    """The method of each format, numbered from 1."""
    bits: tuple[int, ...]
    """The width of each format, numbered from 1 in the order of the widths."""
    values: Mapping[str, Tensor]
    """The compression ratio and the logarithm of the error in each format, f32 [formats, 2], by a weight's path."""

    def table(self, graph: Graph) -> Tensor:
        """The features of all nodes, f32 [nodes, 1 + formats, 2], standardized over layers; zeros without a format."""
        known = torch.stack([*self.values.values()]).flatten(0, 1)
        mean, spread = known.mean(0), known.std(0).clamp_min(1e-6)
        found = torch.zeros(len(graph.nodes), 1 + len(self.formats), 2)
        for place in graph.layers:
            found[place, 1:] = (self.values[str(graph.nodes[place].path)] - mean) / spread
        return found


class GraphAttention(nn.Module):
    """GATv2 (Brody et al., arXiv 2105.14491) with one head, over a node and the nodes that it reads.

    ``y_i = sum_j softmax_j(a . leaky_relu(L x_j + R x_i)) L x_j + b``
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)
        self.score = nn.Parameter(torch.randn(outputs) / outputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        """Attends from every node to the nodes that it reads: x [B, N, C] to [B, N, outputs].

        Args:
            x: the embeddings.
            index: i64 [N, D], the nodes that each node reads, itself among them.
            mask: bool [N, D], false for padding.
        """
        left: Tensor = self.left(x).index_select(1, index.flatten()).unflatten(1, index.shape)
        score = nn.functional.leaky_relu(left + self.right(x)[:, :, None], SLOPE) @ self.score
        return (torch.softmax(score.masked_fill(~mask, -torch.inf), -1)[..., None] * left).sum(2) + self.bias


class _Norm(nn.BatchNorm1d):
    """Batch norm over batch and nodes of [B, N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).view_as(x)


class Predictor(nn.Module):
    """Embeds the nodes of a graph, or of a part of it, and predicts the quality of a configuration."""

    def __init__(self, graph: Graph, features: Features, hops: int) -> None:
        super().__init__()
        operations = sorted({node.operation for node in graph.nodes})
        place = [[node.index, operations.index(node.operation)] for node in graph.nodes]
        self.place: Tensor
        self.values: Tensor
        self.codes: Tensor
        self.register_buffer("place", torch.tensor(place))
        self.register_buffer("values", features.table(graph))
        self.register_buffer("codes", torch.tensor([[0, 0], *zip(features.kinds, features.bits, strict=True)]))
        self.method = nn.Embedding(1 + max(features.kinds), EMBEDDING)
        self.bits = nn.Embedding(1 + max(features.bits), EMBEDDING)
        self.reduction, self.error = nn.Linear(1, EMBEDDING), nn.Linear(1, EMBEDDING)
        self.block = nn.Embedding(1 + max(node.index for node in graph.nodes), WIDE)
        self.operation = nn.Embedding(len(operations), WIDE)
        whole = 4 * EMBEDDING + 2 * WIDE
        self.node = nn.Sequential(
            _Norm(whole), nn.ReLU(), nn.Linear(whole, 64), _Norm(64), nn.ReLU(), nn.Linear(64, NODE), _Norm(NODE),
            nn.ReLU(),
        )  # fmt: skip
        sizes = [NODE, *(HIDDEN for _ in range(hops))]
        self.attention = nn.ModuleList(GraphAttention(sizes[i], sizes[i + 1]) for i in range(hops))
        self.norms = nn.ModuleList(_Norm(HIDDEN) for _ in range(hops))
        self.head = nn.Sequential(nn.Linear(sizes[-1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def forward(self, choices: Tensor, nodes: Tensor, index: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Predicts the quality [B], and returns the L1 norms of the embeddings [B, N] after 0, 1, ... hops, too.

        Args:
            choices: i64 [B, N], the format of each node, from 1 on; 0 where it has none.
            nodes: i64 [N], the places of the nodes in the graph.
            index: [N, D], as `GraphAttention` takes it.
            mask: [N, D], as `GraphAttention` takes it.
        """
        method, bits = self.codes[choices].unbind(-1)
        reduction, error = self.values[nodes, choices].split(1, -1)
        block, operation = (
            embedding(place).expand(len(choices), -1, -1)
            for embedding, place in zip((self.block, self.operation), self.place[nodes].unbind(-1), strict=True)
        )
        parts = (self.method(method), self.bits(bits), self.reduction(reduction), self.error(error), block, operation)
        x = self.node(torch.cat(parts, -1))
        norms = [x.abs().sum(-1)]
        for hop, (attention, norm) in enumerate(zip(self.attention, self.norms, strict=True)):
            y = torch.relu(norm(attention(x, index, mask)))
            x = y + x if hop else y
            norms.append(x.abs().sum(-1))
        return self.head(x.mean(1))[:, 0], norms


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pads N lists to a common length D: an index i64 [N, D] and a mask bool [N, D]."""
    most = max(map(len, rows))
    index = torch.tensor([[*row, *(most - len(row)) * [0]] for row in rows])
    return index, torch.arange(most) < torch.tensor([len(row) for row in rows])[:, None]


def soft_ranks(values: Tensor) -> Tensor:
    """Differentiable ranks of values [B]: sigmoids of standardized differences count the smaller values."""
    standard = (values - values.mean()) / values.std().clamp_min(1e-6)
    return torch.sigmoid((standard[:, None] - standard) / TEMPERATURE).sum(1)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of a and b [N]."""
    a, b = a - a.mean(), b - b.mean()
    norms: Tensor = a.norm() * b.norm()
    return (a * b).sum() / norms.clamp_min(1e-8)


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of a and b [N], without care for ties."""
    return float(correlation(*(x.argsort().argsort().double() for x in (a, b))))


def relevance(labels: Tensor, known: Tensor) -> Tensor:
    """The relevance of labels, f64 from 0 to `MOST`: 0 for the worst fifth of the ``known`` ones, most for the best."""
    low, high = torch.quantile(known.double(), 0.2), known.double().max()
    return MOST * ((labels.double() - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def _gains(relevant: Tensor) -> Tensor:
    """The gains 2^relevance - 1 [N], relative to that of the most relevant one."""
    return (torch.exp2(relevant - relevant.max()) - torch.exp2(-relevant.max())).clamp_min(0)


def _discounts(places: Tensor) -> Tensor:
    """What a gain counts at places [N], from 0 on."""
    return torch.where(places < PLACES, 1 / torch.log2(places.double() + 2), 0.0)


def ndcg(scores: Tensor, relevant: Tensor) -> float:
    """Normalized discounted cumulative gain of a ranking by scores [N], at most 1 (Järvelin and Kekäläinen 2002)."""
    gains, order = _gains(relevant), torch.argsort(scores, descending=True, stable=True)
    weights = _discounts(torch.arange(len(gains)))
    best = float(gains.sort(descending=True).values @ weights)
    return float(gains[order] @ weights) / best if best > 0 else 1.0


def lambda_rank(scores: Tensor, relevant: Tensor) -> Tensor:
    """The loss of scores [N] by relevance [N] whose gradients are LambdaRank's (Burges 2010, MSR-TR-2010-82, sigma 1).

    Each pair has the logistic loss of its order, weighted by what an exchange of the two does to NDCG.
    """
    gains, order = _gains(relevant), torch.argsort(scores.detach(), descending=True, stable=True)
    weights = _discounts(order.argsort())
    best = gains.sort(descending=True).values @ _discounts(torch.arange(len(gains)))
    change = (gains[:, None] - gains).abs() * (weights[:, None] - weights).abs() / best.clamp_min(1e-12)
    pairs = nn.functional.softplus(scores - scores[:, None]).double()  # the row's to be above the column's
    return (change * pairs)[relevant[:, None] > relevant].sum().to(scores.dtype)


@dataclass(frozen=True)
class Scored:
    """The scores by one fold's predictor."""

    prediction: float
    """Spearman's correlation of prediction and truth on the configurations held out from its training."""
    hops: tuple[float, ...]
    """Spearman's correlation of each hop's pooled norms with the truth, times NDCG where training was by that.

    It weights scores of units of that reach.
    """
    variants: tuple[tuple[float, ...], ...]
    """The score of each variant of each unit, in the order of `variants_of`."""

    def to_json(self) -> list[Any]:
        """The scores as plain lists, in `DIGITS` digits."""

        def plain(values: Sequence[float]) -> list[float]:
            return [float(f"{value:.{DIGITS}g}") for value in values]

        return [self.prediction, plain(self.hops), [plain(v) for v in self.variants]]

    @staticmethod
    def from_json(value: Sequence[Any]) -> Scored:
        """The scores that `to_json` wrote."""
        return Scored(value[0], tuple(value[1]), tuple(map(tuple, value[2])))


@dataclass
class Learner:
    """Trains predictors on labelled configurations, and scores units with them.

    A configuration maps the path of each weight to its format, numbered from 1. A larger label is a better output.
    """

    graph: Graph
    features: Features
    units: list[Unit]
    """The units to score."""
    training: Training = field(default_factory=Training)
    seed: int = 0

    def __post_init__(self) -> None:
        self.pools: dict[int, list[int]] = {0: self.graph.layers}
        for unit in units(self.graph):
            if unit.hops:
                self.pools.setdefault(unit.hops, []).append(unit.root)
        self.hops = max(self.pools)
        self.everything = torch.arange(len(self.graph.nodes))
        self.edges = padded(neighbours(self.graph, range(len(self.graph.nodes))))

    def encoded(self, configurations: Sequence[Mapping[str, int]]) -> Tensor:
        """Encodes configurations as the choice of every node, i64 [configurations, nodes]."""
        return torch.tensor([by_path(self.graph, c, range(len(self.graph.nodes))) for c in configurations])

    def predictors(self) -> list[Predictor]:
        """Makes an untrained predictor for each fold; its weights depend on the seed alone."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return [Predictor(self.graph, self.features, self.hops) for _ in range(self.training.folds)]

    def split(self, fold: int, count: int) -> tuple[Tensor, Tensor]:
        """Splits configurations for a fold: the indices to train on, and those to judge by."""
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        held = torch.arange(count) % self.training.folds == fold
        return order[~held], order[held]

    def fit(self, predictor: Predictor, fold: int, choices: Tensor, labels: Tensor) -> None:
        """Trains a predictor on a fold's training part.

        Args:
            predictor: is trained in place.
            fold: the index of the fold.
            choices: all configurations (`encoded`).
            labels: of all configurations, [configurations].
        """
        how, (rows, _) = self.training, self.split(fold, len(labels))
        generator = torch.Generator().manual_seed(self.seed + 1 + fold)
        wanted = (labels - labels[rows].mean()) / labels[rows].std().clamp_min(1e-6)
        relevant = relevance(labels, labels[rows])
        optimizer = torch.optim.AdamW(predictor.parameters(), how.rate, weight_decay=how.decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.epochs)
        predictor.train()
        for _ in range(how.epochs):
            shuffled = rows[torch.randperm(len(rows), generator=generator)]
            for batch in shuffled.tensor_split(max(1, round(len(rows) / how.batch))):
                prediction, norms = predictor(choices[batch], self.everything, *self.edges)
                loss = (prediction - wanted[batch]).square().mean()
                ranks = wanted[batch].argsort().argsort().float()
                for hop, pool in self.pools.items():
                    pooled, ranked = norms[hop][:, pool].mean(1), torch.zeros(())
                    if how.ranking != "ndcg":
                        ranked = 1 - correlation(soft_ranks(pooled), ranks)
                    if how.ranking != "spearman":
                        ranked = ranked + lambda_rank(pooled, relevant[batch])
                    loss = loss + how.ranks / len(self.pools) * ranked
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(predictor.parameters(), how.clip)
                optimizer.step()
            schedule.step()
        predictor.eval()

    @torch.no_grad()
    def scored(self, predictor: Predictor, fold: int, choices: Tensor, labels: Tensor) -> Scored:
        """Scores all variants of the units, standardized by the norms over the training's configurations.

        Args:
            predictor: trained on the fold.
            fold: the index of the fold.
            choices: all configurations (`encoded`).
            labels: of all configurations, [configurations].
        """
        seen, held = self.split(fold, len(labels))
        prediction, judged = predictor(choices[held], self.everything, *self.edges)
        moments = self.moments(predictor, choices[seen])

        def weight(pooled: Tensor) -> float:
            found = spearman(pooled, labels[held])
            if self.training.ranking == "spearman":
                return found
            return found * ndcg(pooled, relevance(labels[held], labels[seen]))

        pooled = {hop: judged[hop][:, pool].mean(1) for hop, pool in self.pools.items()}
        hops = tuple(weight(pooled[hop]) if hop in pooled else 0.0 for hop in range(self.hops + 1))
        found = []
        for unit in self.units:
            mean, spread = moments[unit.hops]
            standard = (self.norms(predictor, unit) - mean) / spread
            found.append(tuple((max(hops[unit.hops], 0.0) * standard).tolist()))
        return Scored(spearman(prediction, labels[held]), hops, tuple(found))

    @torch.no_grad()
    def moments(self, predictor: Predictor, choices: Tensor) -> dict[int, tuple[float, float]]:
        """The mean and standard deviation of the pooled norms over configurations, by hop."""
        norms = predictor(choices, self.everything, *self.edges)[1]
        pooled = {hop: norms[hop][:, pool] for hop, pool in self.pools.items()}
        return {hop: (float(v.mean()), max(float(v.std()), 1e-6)) for hop, v in pooled.items()}

    @torch.no_grad()
    def norms(self, predictor: Predictor, unit: Unit) -> Tensor:
        """The norm of the root's embedding after the unit's hops for each variant [V], on the unit's subgraph alone."""
        index, mask = padded(neighbours(self.graph, unit.nodes))
        paths = self.paths(unit)
        variants = torch.tensor(
            [
                by_path(self.graph, dict(zip(paths, (c + 1 for c in chosen), strict=True)), unit.nodes)
                for chosen in variants_of(len(self.features.formats), len(paths))
            ]
        )
        norms: list[Tensor] = predictor(variants, torch.tensor(unit.nodes), index, mask)[1]
        return norms[unit.hops][:, unit.nodes.index(unit.root)]

    def paths(self, unit: Unit) -> list[str]:
        """The paths of a unit's weights, in the order of its variants."""
        return [str(self.graph.nodes[place].path) for place in unit.layers]


def variants_of(formats: int, layers: int) -> list[tuple[int, ...]]:
    """All assignments of formats to the layers of a unit, in lexicographic order."""
    return list(product(range(formats), repeat=layers))
