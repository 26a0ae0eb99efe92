"""A graph neural network that learns from measured configurations what a format does in a place (Qua2SeDiMo).

The network reads a configuration (a format for every layer) on the dependency graph and predicts how good the output
is; it is trained so that, besides, the norms of its embeddings rank the configurations, hop by hop. The norm of one
node's embedding after m layers then scores the unit of layers that it reaches in m steps, alone (arXiv 2412.14628,
section 3.2; its released code for features, sizes and losses). Torch is all that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from mpq_compiler.allocation.qua2sedimo.graph import Graph, Unit, by_path, neighbours, units

EMBEDDING, WIDE, NODE = 5, 10, 16
"""Sizes of the embeddings of a node's format, of its place, and of the whole node before any attention."""
HIDDEN = 32
SLOPE = 0.2
"""Of the leaky ReLU within the attention."""
TEMPERATURE = 0.3
"""Of the sigmoids that count ranks, in standard deviations."""
DIGITS = 6


@dataclass(frozen=True)
class Training:
    """How the network is trained: AdamW on a cosine, on four fifths of the configurations for each of five folds."""

    folds: int = 5
    epochs: int = 60
    batch: int = 60
    rate: float = 3e-3
    decay: float = 1e-4
    clip: float = 5.0
    ranks: float = 1.0
    """Weight of the rank loss beside the squared error of the prediction."""


@dataclass(frozen=True)
class Features:
    """What is known of the formats a layer can have, beside its place in the graph."""

    formats: tuple[str, ...]
    kinds: tuple[int, ...]
    """The method of each format, from 1 on."""
    bits: tuple[int, ...]
    """The width of each format, as a place among those there are, from 1 on."""
    values: Mapping[str, Tensor]
    """Of each weight, by its path, f32 [formats, 2]: how many times smaller it gets, and the logarithm of its error."""

    def table(self, graph: Graph) -> Tensor:
        """f32 [nodes, 1 + formats, 2], standardized over the layers; zeros where there is no format."""
        known = torch.stack([*self.values.values()]).flatten(0, 1)
        mean, spread = known.mean(0), known.std(0).clamp_min(1e-6)
        found = torch.zeros(len(graph.nodes), 1 + len(self.formats), 2)
        for place in graph.layers:
            found[place, 1:] = (self.values[str(graph.nodes[place].path)] - mean) / spread
        return found


class GraphAttention(nn.Module):
    """GATv2 (Brody et al., arXiv 2105.14491): of one head, over a node and what it reads.

    ``y_i = sum_j softmax_j(a . leaky_relu(L x_j + R x_i)) L x_j + b``
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)
        self.score = nn.Parameter(torch.randn(outputs) / outputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        """x [B, N, C]; index and mask [N, D]: the places that each node reads, itself among them, and which count."""
        left = self.left(x).index_select(1, index.flatten()).unflatten(1, index.shape)
        score = nn.functional.leaky_relu(left + self.right(x)[:, :, None], SLOPE) @ self.score
        return (torch.softmax(score.masked_fill(~mask, -torch.inf), -1)[..., None] * left).sum(2) + self.bias


class _Norm(nn.BatchNorm1d):
    """Over batch and nodes of [B, N, C]."""

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
        """The prediction [B], and the L1 norms of the nodes' embeddings [B, N] after 0, 1, ... hops.

        choices: i64 [B, N], the format of each node from 1 on, 0 where it has none. nodes: i64 [N], their places in the
        graph. index, mask: [N, D], as `GraphAttention` takes them.
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
    """Lists of different lengths as an index i64 [N, D] and a mask [N, D]."""
    most = max(map(len, rows))
    index = torch.tensor([[*row, *(most - len(row)) * [0]] for row in rows])
    return index, torch.arange(most) < torch.tensor([len(row) for row in rows])[:, None]


def soft_ranks(values: Tensor) -> Tensor:
    """How many of the values [B] are smaller than each, counted by sigmoids of their standardized differences."""
    standard = (values - values.mean()) / values.std().clamp_min(1e-6)
    return torch.sigmoid((standard[:, None] - standard) / TEMPERATURE).sum(1)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-8)


def spearman(a: Tensor, b: Tensor) -> float:
    """The rank correlation of values that all differ."""
    return float(correlation(*(x.argsort().argsort().double() for x in (a, b))))


@dataclass(frozen=True)
class Scored:
    """What one fold's predictor says."""

    prediction: float
    """Spearman correlation of prediction and truth on the configurations that it was not trained on."""
    hops: tuple[float, ...]
    """The same of the pooled norms of each hop: how much the scores of units of so many hops count."""
    variants: tuple[tuple[float, ...], ...]
    """Of each unit, the score of each of its variants, in the order of `variants_of`."""

    def to_json(self) -> list[Any]:
        def plain(values: Sequence[float]) -> list[float]:
            return [float(f"{value:.{DIGITS}g}") for value in values]

        return [self.prediction, plain(self.hops), [plain(v) for v in self.variants]]

    @staticmethod
    def from_json(value: Sequence[Any]) -> Scored:
        return Scored(value[0], tuple(value[1]), tuple(map(tuple, value[2])))


@dataclass
class Learner:
    """Trains predictors on labelled configurations, and scores units with them.

    Configurations are given as the formats of the weights by their paths, from 1 on; labels are larger where the output
    is better.
    """

    graph: Graph
    features: Features
    units: list[Unit]
    """Those that are scored."""
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
        """i64 [configurations, nodes]"""
        return torch.tensor([by_path(self.graph, c, range(len(self.graph.nodes))) for c in configurations])

    def predictors(self) -> list[Predictor]:
        """One for each fold, with initial weights that depend on the seed alone."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return [Predictor(self.graph, self.features, self.hops) for _ in range(self.training.folds)]

    def split(self, fold: int, count: int) -> tuple[Tensor, Tensor]:
        """The configurations of a fold: those to train on, and those to judge by."""
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        held = torch.arange(count) % self.training.folds == fold
        return order[~held], order[held]

    def fit(
        self, predictor: Predictor, fold: int, choices: Tensor, labels: Tensor, advance: Callable[..., None]
    ) -> None:
        """Trains on the part of a fold; ``advance(1)`` after every epoch."""
        how, (rows, _) = self.training, self.split(fold, len(labels))
        generator = torch.Generator().manual_seed(self.seed + 1 + fold)
        wanted = (labels - labels[rows].mean()) / labels[rows].std().clamp_min(1e-6)
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
                    ranked = 1 - correlation(soft_ranks(norms[hop][:, pool].mean(1)), ranks)
                    loss = loss + how.ranks / len(self.pools) * ranked
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(predictor.parameters(), how.clip)
                optimizer.step()
            schedule.step()
            advance(1)
        predictor.eval()

    @torch.no_grad()
    def scored(self, predictor: Predictor, fold: int, choices: Tensor, labels: Tensor) -> Scored:
        """The scores of all variants of the units, standardized over the norms in the training's configurations."""
        seen, held = self.split(fold, len(labels))
        prediction, judged = predictor(choices[held], self.everything, *self.edges)
        moments = self.moments(predictor, choices[seen])
        hops = tuple(
            spearman(judged[hop][:, self.pools[hop]].mean(1), labels[held]) if hop in self.pools else 0.0
            for hop in range(self.hops + 1)
        )
        found = []
        for unit in self.units:
            mean, spread = moments[unit.hops]
            standard = (self.norms(predictor, unit) - mean) / spread
            found.append(tuple((max(hops[unit.hops], 0.0) * standard).tolist()))
        return Scored(spearman(prediction, labels[held]), hops, tuple(found))

    @torch.no_grad()
    def moments(self, predictor: Predictor, choices: Tensor) -> dict[int, tuple[float, float]]:
        """Mean and standard deviation of the norms that are pooled, by hop, over configurations."""
        norms = predictor(choices, self.everything, *self.edges)[1]
        pooled = {hop: norms[hop][:, pool] for hop, pool in self.pools.items()}
        return {hop: (float(v.mean()), max(float(v.std()), 1e-6)) for hop, v in pooled.items()}

    @torch.no_grad()
    def norms(self, predictor: Predictor, unit: Unit) -> Tensor:
        """The norm of the root's embedding after the unit's hops, of each variant [V]; the unit is cut out."""
        index, mask = padded(neighbours(self.graph, unit.nodes))
        paths = self.paths(unit)
        variants = torch.tensor(
            [
                by_path(self.graph, dict(zip(paths, (c + 1 for c in chosen), strict=True)), unit.nodes)
                for chosen in variants_of(len(self.features.formats), len(paths))
            ]
        )
        _, norms = predictor(variants, torch.tensor(unit.nodes), index, mask)
        return norms[unit.hops][:, unit.nodes.index(unit.root)]

    def paths(self, unit: Unit) -> list[str]:
        """The weights of a unit, in the order of its variants."""
        return [str(self.graph.nodes[place].path) for place in unit.layers]


def variants_of(formats: int, layers: int) -> list[tuple[int, ...]]:
    """All ways to give formats to the layers of a unit, in order."""
    return list(product(range(formats), repeat=layers))
