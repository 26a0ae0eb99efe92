"""Training of a quantized program against the float model: stages of variables, the best state kept.

A step takes a batch of the float model's calls, of mixed times, and moves the variables of the stage against the
relative squared error of the output. Steps are counted, never timed, and gradients are summed part by part in a fixed
order, so that the same seed gives the same bits whatever else the machine does, and however many jobs there are. The
state is kept in the cache as training goes on: one that was killed goes on where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpq_compiler import cache, costs, ops, sampler
from mpq_compiler.ablation import by_gains
from mpq_compiler.blocks import Block, cut, weight_path_of
from mpq_compiler.calibration import batches
from mpq_compiler.denoiser import Denoiser, record_teacher
from mpq_compiler.formats.base import nearest_codes
from mpq_compiler.pass_manager import Session
from mpq_compiler.program import Program, part_of, run
from mpq_compiler.recording import held_out_rows, latent_numbers
from mpq_compiler.relation import Memory, Relations, Term
from mpq_compiler.relation import Step as RelationStep
from mpq_compiler.student import Kind, Student, Variable, settled, values, variables

BATCH = 32
PART = 16
"""Inputs of which a thread takes the gradient; the parts of a batch are summed in order."""
BETAS, EPSILON = (0.9, 0.99), 1e-12
CLIP = 4.0
"""How many times its usual norm the gradient of a step may have."""
RATES: Mapping[Kind, float] = {
    Kind.LATENT: 1.5e-3,
    Kind.SCALE: 7.5e-4,
    Kind.OFFSET: 7.5e-4,
    Kind.RANGE: 7.5e-4,
    Kind.ZERO: 1.5e-3,
    Kind.FLOAT: 7.5e-4,
}
"""Learning rates at the start, in units of theta (`student`); they fall to zero along a cosine."""
CHECKS = 16
"""How often in a stage the held-out error is measured, and the state kept."""
MACS = 2.4e10
"""Multiply-accumulates of layers that two cores get through in a second of training, the gradients' included."""
SEED = 1 << 20
"""Added to the seed, so that training sees noise that neither calibration nor evaluation draws."""
HELD_OUT = 8
"""Trajectories to judge by, beside those that are trained on; of given calls one in so many."""
IMAGE_STEPS = 10


@dataclass(frozen=True)
class Data:
    """The float model's calls: inputs [N, ...] by name, and its outputs for them [N, C, H, W]."""

    inputs: dict[str, Tensor]
    targets: Tensor
    teacher: Program | None = None
    """What makes other targets than those, where they are too many to keep."""
    weights: Tensor | None = None
    """f32 [N]: how much the error of a call counts; None: all alike."""
    stride: int | None = None
    """Calls from one step of a trajectory to the next; None where the order is not known."""

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, index: Tensor) -> Data:
        weights = None if self.weights is None else self.weights[index]
        inputs = {name: x[index] for name, x in self.inputs.items()}
        return replace(self, inputs=inputs, targets=self.targets[index], weights=weights, stride=None)

    def before(self, index: Tensor, steps: int) -> list[dict[str, Tensor]]:
        """Inputs of so many calls before those of ``index`` in their trajectories; nothing where these are not known.

        Before the first call stands that call itself.
        """
        found: list[dict[str, Tensor]] = []
        while self.stride is not None and len(found) < steps:
            index = torch.where(index < self.stride, index, index - self.stride)
            found.append({name: x[index] for name, x in self.inputs.items()})
        return found

    def weighted(self, gains: Sequence[tuple[float, float]]) -> Data:
        """The calls, whose errors count by gains at ascending timesteps (`ablation.by_gains`), 1 on average."""
        weights = by_gains(self.inputs["timestep"], gains)
        return replace(self, weights=(weights / weights.mean()).float())

    def parts_of_key(self) -> tuple[dict[str, Tensor], ...]:
        """All that a training on the calls depends on."""
        return self.inputs, {"targets": self.targets}, {} if self.weights is None else {"weights": self.weights}

    def squared(self, values: Tensor) -> Tensor:
        """The squares of values [N, ...] of the calls, a sum over each call that counts by its weight, f32 [N]."""
        sums = values.square().flatten(1).sum(1)
        return sums if self.weights is None else sums * self.weights

    def judged_by(self, teacher: Program, session: Session | None = None) -> Data:
        """The calls with a float program's outputs as targets: now, or as they are asked for."""
        if session is None:
            return replace(self, teacher=teacher)
        outputs = session.map(lambda piece: run(teacher, piece.inputs), self.parts())
        return replace(self, targets=torch.cat(outputs))

    def wanted(self) -> Tensor:
        return self.targets if self.teacher is None else run(self.teacher, self.inputs)

    def parts(self) -> Iterator[Data]:
        for start in range(0, len(self), PART):
            yield self.select(torch.arange(start, min(start + PART, len(self))))


def calls(session: Session, samples: int, steps: int) -> tuple[Data, Data]:
    """Calls of the float model to train on, and others to judge by: of its sampling, or of the inputs given."""
    denoiser = session.denoiser
    assert denoiser is not None
    given = session.calibration
    total = len(given["timestep"]) if given else (samples + HELD_OUT) * steps * denoiser.calls_per_step
    with session.track("teaching", total) as advance:

        def teacher(**inputs: Any) -> np.ndarray:
            output = denoiser(**inputs).numpy()
            advance(len(output))
            return output

        if given is not None:
            outputs = np.concatenate([teacher(**batch) for batch in batches(given)])
            both = Data(given, torch.from_numpy(outputs))
            chosen = held_out_rows(latent_numbers(given), given["timestep"], HELD_OUT)
            if not bool(chosen.any()):
                return both, both
            return both.select(~chosen), both.select(chosen)
        seed = session.seed + SEED
        stride = samples * denoiser.calls_per_step
        return (
            Data(*record_teacher(denoiser, samples, steps, seed, teacher), stride=stride),
            Data(*record_teacher(denoiser, HELD_OUT, steps, seed + 1, teacher)),
        )


def affordable(program: Program, minutes: float) -> int:
    """Steps of training in the minutes given, reckoned from the size of the model alone."""
    macs = sum(costs.macs(program.facts["planned"]).values())
    return int(minutes * 60 * MACS / (3 * BATCH * max(macs, 1)))


def block_updates(program: Program, found: Sequence[Block], updates: int) -> int:
    """Steps of training of each block in the time of so many of the whole program.

    A step of a block runs what leads up to it forward, in the float program too, and the block itself backward.
    """
    planned: Program = program.facts["planned"]
    macs = costs.macs(planned)
    own = {n.name: str(costs.weight_path(n)) for n in planned.quantizable}
    spent = 0
    for block in found:
        reached = {n.name for n in cut(planned, block.output).graph.nodes} & macs.keys()
        inside = sum(macs[name] for name in reached if own[name] in block.parameters)
        spent += 2 * (sum(macs[name] for name in reached) + inside)
    return updates * 3 * sum(macs.values()) // max(spent, 1)


def trajectories(updates: int, epochs: int, steps: int) -> int:
    """How many of so many steps give the updates calls that come back so often at most."""
    return -(-updates * BATCH // (epochs * steps))


@dataclass(frozen=True)
class Stage:
    """What is trained, and for how many steps."""

    name: str
    latent: bool
    """Latent weights too, and with them the codes; else those are frozen."""
    steps: int
    rates: Mapping[Kind, float] = field(default_factory=lambda: dict(RATES))
    """Of learning, by kind of variable."""
    block: Block | None = None
    """The one block that is trained, against its own output in the float program; else all of the program."""
    relation: Term | None = None
    """A loss of features beside that of the output (`relation`)."""
    adapters: int = 0
    """The rank of what moves latent weights (`student.Adapted`); 0: each moves by itself."""
    range_network: bool = False
    """Networks make the scales of activations (`student.Timed`); else each moves by itself."""


@dataclass(frozen=True)
class Outcome:
    """Held-out noise power relative to the output's, before a stage and of the state that was kept."""

    stage: str
    steps: int
    before: float
    after: float
    best_step: int
    diverged: int | None
    """The step in which training gave up, where it did."""


@dataclass
class _State:
    """Where training is: thetas, the moments of Adam, and the best thetas so far."""

    thetas: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    best: dict[str, Tensor]
    memory: dict[str, Tensor] = field(default_factory=dict)
    """The parts of a `relation.Memory`, where there is one."""
    step: int = 0
    usual: float = 0.0
    """A running mean of the gradient's norm."""
    before: float = math.inf
    least: float = math.inf
    best_step: int = 0
    diverged: int | None = None

    @classmethod
    def start(cls, trained: Mapping[str, Variable]) -> _State:
        zeros = {name: variable.zeros() for name, variable in trained.items()}
        return cls(dict(zeros), dict(zeros), dict(zeros), zeros)


def train(
    program: Program, stage: Stage, data: Data, held_out: Data, session: Session, seed: int
) -> tuple[Program, Outcome]:
    """The program with the values of the variables that erred least on ``held_out``, those of the start among them."""
    times = group_times(program, data.inputs["timestep"]) if stage.range_network else None
    whole, trained = program, variables(program, stage.latent, stage.adapters, times, seed)
    key = _key(program, trained, stage, data, held_out, seed)
    if stage.block is not None:
        program, teacher = (cut(p, stage.block.output) for p in (program, program.facts["planned"]))
        own = _variables_of(program, stage.block)
        trained = {name: variable for name, variable in trained.items() if name in own}
        data, held_out = data.judged_by(teacher), held_out.judged_by(teacher, session)
    kept = _Kept(key, session)
    state = kept.load() or _State.start(trained)
    checks = {round(stage.steps * (i + 1) / CHECKS) for i in range(CHECKS)}
    power = float(held_out.squared(held_out.targets).double().mean())
    relations = None
    if stage.relation is not None:
        relations = Relations.start(stage.relation, program, data.inputs)
        relations.memory = Memory(**state.memory) if state.memory else relations.memory
        state.memory = vars(relations.memory)
    if not state.step:
        state.before = state.least = noise(program, trained, state.thetas, held_out, session)
    with session.track(f"training {stage.name}", stage.steps) as advance:
        advance(state.step)
        while state.step < stage.steps and state.diverged is None:
            state.step += 1
            index = _batch(state.step, len(data), seed)
            batch, drawn = data.select(index), None
            if relations is not None:
                before = data.before(index, relations.term.window - 1)
                drawn = relations.step(len(batch), torch.Generator().manual_seed((seed << 32) + state.step), before)
            loss, gradients = _gradients(program, trained, state.thetas, batch, power, session, drawn)
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
            if not math.isfinite(loss + norm):
                state.diverged = state.step
                break
            state.usual = norm if state.step == 1 else 0.9 * state.usual + 0.1 * min(norm, CLIP * state.usual)
            shrink = min(1.0, CLIP * state.usual / max(norm, 1e-30))
            decay = 0.5 * (1 + math.cos(math.pi * (state.step - 1) / stage.steps))
            rates = {name: stage.rates[variable.kind] * decay for name, variable in trained.items()}
            _adam(state, {name: g * shrink for name, g in gradients.items()}, rates)
            if state.step in checks:
                error = noise(program, trained, state.thetas, held_out, session)
                if error < state.least:
                    state.least, state.best, state.best_step = error, dict(state.thetas), state.step
                kept.save(state)
            advance(1, f"(loss {loss:.2g}, best {-10 * math.log10(max(state.least, 1e-30)):.1f} dB)")
    outcome = Outcome(stage.name, stage.steps, state.before, state.least, state.best_step, state.diverged)
    return applied(whole, trained, state.best), outcome


def group_times(program: Program, timesteps: Tensor) -> Tensor:
    """f32 [G]: the middles of the time groups, from 0 to 1 over the range of the timesteps."""
    boundaries = program.facts["time-groups"]
    low, high = torch.cat([timesteps.to(torch.float32), boundaries]).aminmax()
    ends = torch.cat([low[None], boundaries, high[None]])
    return ((ends[1:] + ends[:-1]) / 2 - low) / (high - low)


def _variables_of(program: Program, block: Block) -> set[str]:
    """Store names of what belongs to a block: its parameters, and the tables of what its layers read.

    program: cut at the output of the block.
    """
    names: set[str] = set()
    tables: dict[str, set[str]] = {}
    for node in program.graph.nodes:
        read = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        names |= {name for name in read if name.split(":")[0] in block.parameters}
        if node.target in (ops.fake_quantize, ops.fake_quantize_attention):
            tables[node.name] = {name for name in read if name.split(":")[0] not in program.weights}
    for node in program.graph.nodes:
        layer = weight_path_of(node)
        for source in node.all_input_nodes if layer in block.parameters else ():
            names |= tables.get(source.name, set())
    return names


def _batch(step: int, count: int, seed: int) -> Tensor:
    """The calls of a step: every call once in an epoch, in an order of its own."""
    size = min(BATCH, count)
    epoch, place = divmod(step - 1, count // size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + (epoch << 32)))
    return order[place * size : (place + 1) * size]


def _gradients(
    program: Program,
    trained: Mapping[str, Variable],
    thetas: Mapping[str, Tensor],
    batch: Data,
    power: float,
    session: Session,
    relation: RelationStep | None = None,
) -> tuple[float, dict[str, Tensor]]:
    """The relative squared error of a batch, and its gradients by every theta; weights are made once for all parts.

    relation: a loss that is added.
    """
    leaves = {name: theta.detach().requires_grad_() for name, theta in thetas.items()}
    made = values(program, trained, leaves)

    def part(numbered: tuple[int, Data]) -> tuple[float, tuple[Tensor | None, ...], Tensor | None]:
        number, piece = numbered
        inner = {name: value.detach().requires_grad_() for name, value in made.items()}
        wanted = relation and relation.relations.term.node

        def outputs(inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
            """The features that relate, where any do, and the output."""
            seen: list[Tensor] = []
            output = Student(program, inner).run(
                inputs, watch=lambda node, value: seen.append(value) if node.name == wanted else None
            )
            return seen, output

        seen, output = outputs(piece.inputs)
        share, pixels = len(piece) / len(batch), None
        loss = piece.squared(output - piece.wanted()).sum() / (len(batch) * power)
        if relation is not None:
            rows = slice(number * PART, number * PART + len(piece))
            more, pixels = relation.loss(seen[0], piece.inputs, rows, lambda inputs: outputs(inputs)[0][0])
            loss = loss + more * share
        return float(loss.detach()), torch.autograd.grad(loss, list(inner.values()), allow_unused=True), pixels

    pieces = session.map(part, enumerate(batch.parts()))
    if relation is not None:
        group = ops.time_group(batch.inputs["timestep"], program.facts["time-groups"])
        relation.push(torch.cat([pixels for *_, pixels in pieces if pixels is not None]), group)
    reached: dict[str, Tensor] = {}
    for name, *parts in zip(made, *(found for _, found, _ in pieces), strict=True):
        sums = [g for g in parts if g is not None]
        if sums:
            reached[name] = torch.stack(sums).sum(0)
    gradients = torch.autograd.grad(
        [made[name] for name in reached], list(leaves.values()), list(reached.values()),
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return sum(loss for loss, *_ in pieces), dict(zip(thetas, gradients, strict=True))


def _adam(state: _State, gradients: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
    """A step of Adam (Kingma 2015, arXiv 1412.6980, algorithm 1)."""
    for name, g in gradients.items():
        state.first[name] = state.first[name].lerp(g, 1 - BETAS[0])
        state.second[name] = state.second[name].lerp(g.square(), 1 - BETAS[1])
        mean = state.first[name] / (1 - BETAS[0] ** state.step)
        spread = state.second[name] / (1 - BETAS[1] ** state.step)
        state.thetas[name] = state.thetas[name] - rates[name] * mean / (spread.sqrt() + EPSILON)


@torch.no_grad()
def noise(
    program: Program, trained: Mapping[str, Variable], thetas: Mapping[str, Tensor], data: Data, session: Session
) -> float:
    """Squared error of the outputs over the teacher's squared outputs, calls by their weights: an inverse SQNR."""

    made = values(program, trained, thetas)

    def part(piece: Data) -> float:
        output = Student(program, made).run(piece.inputs)
        return float(piece.squared(output - piece.targets).double().sum())

    return sum(session.map(part, data.parts())) / float(data.squared(data.targets).double().sum())


@torch.no_grad()
def applied(program: Program, trained: Mapping[str, Variable], thetas: Mapping[str, Tensor]) -> Program:
    """The program with the variables' values stored, and the codes of latent weights."""
    program = program.fork()
    renamed: dict[str, str] = {}

    def store(name: str, tensor: Tensor) -> None:
        renamed[name] = program.tensors.add(f"{name.split(':')[0]}:{part_of(name) or 'trained'}", tensor)

    for name, variable in trained.items():
        if variable.kind != Kind.LATENT:
            store(name, variable.stored(thetas[name]))
    for weight in settled(program):
        if weight.codes not in trained:
            continue
        rows = trained[weight.codes].stored(thetas[weight.codes])
        scale = program.tensors[renamed[weight.scale]]
        offset = None if weight.offset is None else program.tensors[renamed[weight.offset]]
        row_class = None if weight.row_class is None else program.tensors[weight.row_class]
        codes = nearest_codes(rows, scale, offset, weight.table(program), row_class, weight.segments)
        if weight.signs is None:
            store(weight.codes, codes)
        else:
            store(weight.codes, codes >> 1)
            store(weight.signs, codes & 1)
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target in renamed:
            node.target = renamed[str(node.target)]
    for edge, plan in program.activations.items():
        scale_name, zero = (None if n is None else renamed.get(n, n) for n in (plan.scale, plan.zero_point))
        program.activations[edge] = replace(plan, scale=scale_name, zero_point=zero)
    return program


@dataclass
class Gallery:
    """Held-out images of the float model: noise, conditions, and what it draws of them."""

    denoiser: Denoiser
    conditions: Any
    count: int
    seed: int
    session: Session
    reference: np.ndarray
    outputs: list[np.ndarray]
    """Of the float model, call by call, while the reference was drawn."""

    @property
    def steps(self) -> int:
        """Of sampling: `IMAGE_STEPS`, or as few as the model is compiled for."""
        return min(IMAGE_STEPS, self.session.steps or IMAGE_STEPS)

    @classmethod
    def drawn(cls, session: Session, count: int) -> Gallery | None:
        """None where none are wanted, or the model cannot be sampled: its conditions are not known."""
        denoiser = session.denoiser
        assert denoiser is not None
        if not count or not denoiser.conditioning.possible:
            return None
        seed = session.seed + SEED + 2
        made = cls(denoiser, denoiser.conditioning.mixed(count, seed), count, seed, session, np.empty(0), [])

        def model(**inputs: np.ndarray) -> np.ndarray:
            made.outputs.append(denoiser(**inputs).numpy())
            return made.outputs[-1]

        made.reference = made._draw(model)
        return made

    def noise(self, program: Program) -> float:
        """Squared error of what the program draws over the float model's squared latents."""
        error = self._error(self._draw(lambda **inputs: self._run(program, inputs)))
        return float(error / np.square(self.reference.astype(np.float64)).sum())

    def gains(self, program: Program) -> list[tuple[float, float]]:
        """(timestep, squared error of the images by squared error of the output there), by ascending timesteps.

        Measured with the program's own error in one step at a time, and the float model in all others: what a step errs
        at random later steps clean up, and what it errs alike everywhere they do not.
        """
        found: dict[float, float] = {}
        with self.session.track("gains of times", self.steps) as advance:
            for step in range(self.steps):
                found |= self._gain(program, step)
                advance(1)
        return sorted(found.items())

    def _gain(self, program: Program, hit: int) -> dict[float, float]:
        """The gain at the timestep of one step; nothing where the program makes no error there."""
        seen: dict[float, float] = {}
        known = iter(self.outputs)

        def model(**inputs: np.ndarray) -> np.ndarray:
            time = float(inputs["timestep"].flat[0])
            seen.setdefault(time, 0.0)
            # until an error was made, everything is as when the reference was drawn
            output = self.denoiser(**inputs).numpy() if any(seen.values()) else next(known)
            if [*seen].index(time) != hit:
                return output
            other = self._run(program, inputs)
            seen[time] += float(np.square(other.astype(np.float64) - output).sum())
            return other

        error = self._error(self._draw(model))
        return {time: max(error / caused, 1e-12) for time, caused in seen.items() if caused}

    def _error(self, drawn: np.ndarray) -> float:
        return float(np.square(drawn.astype(np.float64) - self.reference).sum())

    def _run(self, program: Program, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        specs = self.denoiser.input_specs
        given = {n: torch.from_numpy(np.ascontiguousarray(x)).to(specs[n].dtype) for n, x in inputs.items()}
        return torch.cat(self.session.map(lambda batch: run(program, batch), batches(given, PART))).numpy()

    def _draw(self, model: Callable[..., np.ndarray]) -> np.ndarray:
        return sampler.sample(
            model,
            self.denoiser.scheduler,
            sampler.gaussian(self.count, self.denoiser.latent_shape, self.seed),
            steps=self.steps,
            **self.denoiser.conditioning.arguments(self.conditions, self.count, self.denoiser.guidance),
            latent=self.denoiser.latent,
            seed=self.seed,
            batch=self.count,
        )


def _key(program: Program, trained: Mapping[str, Variable], stage: Stage, data: Data, held_out: Data, seed: int) -> str:
    """Everything that the outcome of a stage depends on."""
    import platform

    read = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    text = "\n".join(f"{n.name} {ops.name_of(n.target)} {n.args} {n.kwargs}" for n in program.graph.nodes)
    latents = {name: v.start for name, v in trained.items() if v.kind == Kind.LATENT}
    capability = torch.backends.cpu.get_cpu_capability()
    times = program.facts["time-groups"] if stage.relation else ""  # by which it keeps what other steps had
    versions = f"2 {seed} {stage}{times} {torch.__version__} {platform.machine()} {capability}"
    if stage.block is not None or stage.relation is not None:  # whose teacher is the float program
        read |= {str(n.target) for n in program.facts["planned"].graph.nodes if n.op == "get_attr"}
    tensors = {name: program.tensors[name].contiguous() for name in sorted(read)}
    return cache.digest(
        versions,
        text,
        tensors,
        latents,
        *(d.inputs | {"": d.targets} | ({} if d.weights is None else {" ": d.weights}) for d in (data, held_out)),
    )


class _Kept:
    """The state of one stage in the cache."""

    PARTS = ("thetas", "first", "second", "best", "memory")
    FACTS = ("step", "usual", "before", "least", "best_step", "diverged")

    def __init__(self, key: str, session: Session) -> None:
        self.path = cache.folder(session.cache) / "training" / f"{key}.safetensors"

    def load(self) -> _State | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                facts = json.loads(file.metadata()["state"])
                found: dict[str, dict[str, Tensor]] = {part: {} for part in self.PARTS}
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    part, _, of = name.partition("/")
                    found[part][of] = file.get_tensor(name)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        parts = (found["thetas"], found["first"], found["second"], found["best"], found["memory"])
        return _State(*parts, **facts)

    def save(self, state: _State) -> None:
        from safetensors.torch import save

        tensors = {f"{part}/{name}": t for part in self.PARTS for name, t in getattr(state, part).items()}
        copies = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}  # none is there twice
        facts = json.dumps({name: getattr(state, name) for name in self.FACTS})
        cache.write(self.path, save(copies, {"state": facts}))
