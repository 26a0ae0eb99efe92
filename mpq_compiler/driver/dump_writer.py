"""Writes the program after every pass and lowering stage as a dump: text, and sampled values of every node."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from mpq_compiler.analysis import expected_noise
from mpq_compiler.analysis.teacher_forcing import ROUNDING, Departure, Forced, always, departure, roots
from mpq_compiler.artifact import bundle
from mpq_compiler.inspection.dumps import (
    DEPARTING,
    FILE,
    FLOAT_STAGES,
    OUTPUT,
    OUTPUT_VALUES,
    Dump,
    layers,
    read_dumps,
    readers,
    sample,
)
from mpq_compiler.ir import ops, printer, provenance, views
from mpq_compiler.ir.exact_interpreter import ExactInterpreter
from mpq_compiler.ir.graph import weight_of
from mpq_compiler.ir.program import TIME_GROUPS, Program, Stage
from mpq_compiler.pipeline.passes import Contract, Pass
from mpq_compiler.pipeline.stages import Inspectable, LoweringStage
from mpq_compiler.support import files, tensorfile
from mpq_compiler.support.decibels import sqnr
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import encode_json

# --- what is measured ---------------------------------------------------------------------------------------


class Writer:
    """Writes the dumps of one compilation, pass after pass, and keeps the values to compare the next pass with."""

    def __init__(self, folder: str | Path, inputs: Mapping[str, Tensor], denoiser: Any = None) -> None:
        """Prepares the dumps.

        Args:
            folder: where they go.
            inputs: the inputs on which every program runs.
            denoiser: the model that is traced, with whose layers the first dump is compared; None compares it with
                nothing.
        """
        self.folder, self.inputs, self.denoiser = Path(folder), dict(inputs), denoiser
        self._last: dict[str, Any] = {}
        """The values of the program before, and its output."""
        self._planned: Program | None = None
        """The last program in floats, with its plans where it has any."""
        self._float: dict[str, Any] = {}
        """The values of that program."""
        self._calls: dict[str, float] = {}
        """The expected noise of each call on quantized operands."""
        self._weights: dict[str, tuple[Any, expected_noise.WeightNoise]] = {}
        """The noise of each weight, with the key of the parts that it is of."""
        self._plain: dict[tuple[str, str], expected_noise.Plain] = {}
        """The errors of plain rounding, by the float tensor's store name and the format."""
        self._sources: dict[str, str] = {}
        """The store name of the float tensor that each weight rounds."""
        self._tables: dict[str, tuple[Any, expected_noise.TableNoise | None]] = {}
        self._about: dict[str, Any] = {}
        """The metadata of the dump before."""

    def write(self, index: int, step: Pass, before: Program, program: Program) -> None:
        """Writes both files of a pass, after removing an earlier run's dumps of this pass and later ones.

        Raises:
            UserError: the folder cannot be written.
        """
        found, about = self.probe(step, program, before)
        self._write(index, step.name(), printer.text(program, step.name()), found, about)
        said = encode_json(provenance.document(program), indent=None)
        with self._writable():
            files.write_whole(self.folder / bundle.DECISIONS, lambda file: file.write(said))

    def write_stage(self, index: int, stage: LoweringStage[Any], plan: Inspectable) -> None:
        """Writes both files of a stage of a lowering; ``index`` counts on behind the passes.

        Where this machine cannot run the plan, the text says why, and there are no values.
        """
        text = plan.text(stage.name())
        try:
            found, about = self.probe_stage(stage, plan)
        except UserError as reason:
            found, about = {OUTPUT: np.zeros(0, np.float32)}, {"order": [], "allowed": {}}
            text += f"// no values: {reason}\n"
        shared = {key: self._about.get(key) for key in ("layers", "readers", "boundaries", "decided")}
        about |= {"pass": stage.name(), "contract": str(stage.contract), "stage": "lowered"}
        about |= {"agreeing": False, "departing": [], "consumers": []}
        self._write(index, stage.name(), text, found, shared | about)

    def _write(self, index: int, name: str, text: str, found: dict[str, np.ndarray], about: dict[str, Any]) -> None:
        """The text and the probe. Dumps of the same index and of later ones that an earlier run left go first."""
        folder, stem = self.folder, f"{index:03d}-{name}"
        self._about = about
        with self._writable():
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                match = FILE.fullmatch(path.name)
                if match and int(match[1]) >= index:
                    path.unlink()
            earlier = [d for d in read_dumps(folder) if d.index < index] if index else []
            _add_sqnr(found, earlier)
            metadata = {"mpq": json.dumps(about, separators=(",", ":"), sort_keys=True)}
            files.write_whole(folder / f"{stem}.txt", lambda file: file.write(text.encode()))
            files.write_whole(folder / f"{stem}.safetensors", lambda file: tensorfile.save(file, found, metadata))

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the dumps cannot be written to {self.folder} ({error.strerror}); name another folder with --dumps"
            ) from error

    def probe_stage(self, stage: LoweringStage[Any], plan: Inspectable) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The tensors that the dump of a stage stores and its metadata, but for what it shares with the pass before.

        A selection of kernels is held against the packed program on that program's values, which every call reads. What
        rewrites the plan must leave all values as they are; where one differs, the plan is run once more on the values
        before, so that no call answers for another.
        """
        inputs = {name: value.numpy() for name, value in self.inputs.items()}
        known = {name: _as_array(value) for name, value in self._last.items() if isinstance(value, Tensor)}
        values = plan.run(inputs)
        departures, output = _departures(known, values), plan.output()
        if stage.contract == Contract.LOWERED or any(d.share for d in departures.values()):
            departures = _departures(known, plan.run(inputs, known))
        elif OUTPUT in known:
            departures[OUTPUT] = departure(*_alike(known[OUTPUT], values[output]))
        found = {f"value:{name}": sample(name, torch.from_numpy(value)) for name, value in values.items()}
        found |= {f"shape:{name}": np.array(value.shape, np.int64) for name, value in values.items()}
        found[OUTPUT] = sample(OUTPUT, torch.from_numpy(values[output]), OUTPUT_VALUES)
        found |= {f"local:{name}": _row(d) for name, d in departures.items()}
        self._last = {name: torch.from_numpy(value) for name, value in values.items()}
        self._last[OUTPUT] = self._last[output]
        allowed = {name: plan.tolerance(name) for name in departures if name != OUTPUT}
        return found, {"order": [*values, OUTPUT], "allowed": allowed}

    @torch.no_grad()
    def probe(self, step: Pass, program: Program, before: Program) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Measures the program after a pass: the tensors of its dump (without SQNRs), and the metadata."""
        forced = self._forced(step, program, before)
        output, departing = _run_forced(program, forced, self.inputs)
        simulation = step.contract == Contract.SIMULATION
        if simulation or step.contract == Contract.REWRITE or any(d.share for d in forced.departures.values()):
            natural = Forced(program, {})  # what is forced would hide the errors that nodes inherit
            output = natural.run(self.inputs)
            values = natural.values
        else:
            values = forced.values
        self._remember(program, values, output)
        found = _sampled(program, values, output)
        consumers = _consumers(program, forced) if simulation else []
        found |= {f"local:{name}": _row(d) for name, d in forced.departures.items()}
        if simulation:
            found |= {f"expected:{n}": np.array([v]) for n, v in self._expected(consumers).items()}
            found |= self._weight_arrays(program)
        found |= self._edge_arrays(program)
        return found, {
            "pass": step.name(),
            "contract": str(step.contract),
            "stage": str(program.stage),
            "order": [*values, OUTPUT],
            "agreeing": forced.force is not always,
            "departing": departing,
            "consumers": consumers,
            "layers": layers(program, self._planned),
            "readers": {} if self._planned is None else readers(self._planned),
            "boundaries": program.facts[TIME_GROUPS].tolist() if TIME_GROUPS in program.facts else [],
            "decided": provenance.boundaries(program),
        }

    def _forced(self, step: Pass, program: Program, before: Program) -> Forced:
        """The teacher-forced run of the program, on the known values that the pass's contract compares it with."""
        if step.contract == Contract.EXACT:
            return Forced(program, self._exact(before))
        if step.contract == Contract.SIMULATION:
            return Forced(program, self._float)
        if not before.inputs:
            known = {} if self.denoiser is None else _outputs_of_modules(self.denoiser, self.inputs)
            return Forced(program, known, lambda node, d: not d.share)
        known = self._last or self._run(before)
        if step.contract == Contract.REWRITE:
            first = before.stage == Stage.FLOAT and program.stage != Stage.FLOAT
            return Forced(program, known, lambda node, d: d.largest <= ROUNDING, channels_first=first)
        return Forced(program, known)

    def _exact(self, before: Program) -> dict[str, Any]:
        """The values of the program before in exact mode, which is the only mode of a packed program."""
        if before.stage == Stage.PACKED:
            return self._last or self._run(before)
        values: dict[str, Any] = {}

        def watch(node: fx.Node, value: Any) -> None:
            if node.op == "call_function":
                values[node.name] = value

        values[OUTPUT] = ExactInterpreter(before).run(self.inputs, watch=watch)
        return values

    def _run(self, program: Program) -> dict[str, Any]:
        natural = Forced(program, {})
        output = natural.run(self.inputs)
        return natural.values | {OUTPUT: output}

    def _remember(self, program: Program, values: dict[str, Any], output: Tensor) -> None:
        self._last = values | {OUTPUT: output}
        if program.stage in FLOAT_STAGES:
            self._planned, self._float = program, self._last

    # ----------------------------------------------------------------------------------------- expected

    def _expected(self, consumers: Sequence[str]) -> dict[str, float]:
        """The noise that the plan implies at calls on quantized operands, on the float program's values."""
        planned = self._planned
        if planned is None:
            return {}
        nodes = {n.name: n for n in planned.graph.nodes}
        inputs = {n.name: self.inputs[str(n.target)] for n in planned.graph.nodes if n.op == "placeholder"}
        for name in consumers:
            if name not in self._calls and name in nodes:
                values = self._float | inputs
                found = expected_noise.expected_of_call(planned, nodes[name], values, self.inputs["timestep"])
                if found is not None:
                    self._calls[name] = found
        return {name: self._calls[name] for name in consumers if name in self._calls}

    def _weight_arrays(self, program: Program) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for path, weight in self._noise_of_weights(program).items():
            found[f"weight:{path}"] = np.array([weight.ratio, *weight.relative(1), *weight.relative(0)])
            if weight.suspects:
                found[f"rows:{path}"] = np.array(weight.suspects)
            if len(weight.groups) > 1:
                found[f"groups:{path}"] = weight.groups.numpy()
        return found

    def _noise_of_weights(self, program: Program) -> dict[str, expected_noise.WeightNoise]:
        planned = self._planned
        if planned is None or not program.weights:
            return {}
        sites: dict[str, fx.Node] = {}
        for site in planned.quantizable:
            sites.setdefault(str(weight_of(site)).split(":")[0], site)
        found: dict[str, expected_noise.WeightNoise] = {}
        for layer in views.layers_of(views.flatten(program)):
            levels = layer.levels
            if levels is None or levels.path in found or levels.path not in sites:
                continue
            path, node, call = levels.path, layer.call.args[1], sites[levels.path]
            if levels.weight is not None:
                self._sources[path] = levels.weight
            source, planned_format = self._sources.get(path) or str(weight_of(call)), program.weights[path].format
            key = (source, _parts(node), settled := levels.weight is None)
            if self._weights.get(path, (None,))[0] != key:
                weight, gram = program.tensors.read(source), expected_noise.gram_of(planned, call)
                if (source, planned_format) not in self._plain:
                    self._plain[source, planned_format] = expected_noise.plain_rounding(weight, planned_format, gram)
                plain, quantized = self._plain[source, planned_format], expected_noise.constant(program, node)
                self._weights[path] = key, expected_noise.weight_noise(weight, quantized, gram, plain, settled)
            found[path] = self._weights[path][1]
        return found

    def _edge_arrays(self, program: Program) -> dict[str, np.ndarray]:
        found = {}
        for edge, plan in program.activations.items():
            key = (plan, tuple(program.facts[TIME_GROUPS].tolist()))
            if self._tables.get(edge, (None,))[0] != key:
                self._tables[edge] = key, expected_noise.table_noise(program, edge, plan)
            table = self._tables[edge][1]
            if table is not None:
                columns = (table.scale, table.zero_point, table.measured, table.expected)
                found[f"edge:{edge}"] = np.stack([c.to(torch.float64).numpy() for c in columns])
        return found


def _row(d: Departure) -> np.ndarray:
    """A departure as a dump stores it: a row of six numbers."""
    first, second = (*d.channels, -1, -1)[:2]
    return np.array([d.largest, d.noise, d.share, d.departing, first, second])


def _as_array(value: Tensor) -> np.ndarray:
    """A value as kernels hold it: truth values as 1 and 0."""
    return (value.float() if value.dtype == torch.bool else value).numpy()


def _alike(known: np.ndarray, value: np.ndarray) -> tuple[Tensor, Tensor]:
    """Both in the shape of ``value``: the batch is outermost in a plan."""
    return torch.from_numpy(np.ascontiguousarray(known).reshape(value.shape)), torch.from_numpy(value)


def _departures(known: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray]) -> dict[str, Departure]:
    """How the values depart from the known ones of the same name, size and type."""
    both = [n for n, v in values.items() if n in known and known[n].size == v.size and known[n].dtype == v.dtype]
    return {name: departure(*_alike(known[name], values[name])) for name in both}


def _run_forced(program: Program, forced: Forced, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[str]]:
    """Runs a program forced; returns the output, and the nodes from which values depart and do not return.

    Each of these nodes is found with the ones before it forced.
    """
    agrees, departing = forced.force, set[str]()
    first: dict[str, Departure] = {}
    forced.force = lambda node, found: node.name in departing or agrees(node, found)
    while True:
        output = forced.run(inputs)
        if OUTPUT in forced.known:
            forced.departures[OUTPUT] = departure(forced.known[OUTPUT], output)
        first = forced.departures | {n: d for n, d in first.items() if n in departing}
        found = roots(program, forced.contaminated)
        departing.update(found)
        if not found or len(departing) > DEPARTING:
            forced.departures, forced.force = first, agrees
            return output, [n for n in first if n in departing]


def _sampled(program: Program, values: Mapping[str, Any], output: Tensor) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            continue
        if program.stage == Stage.FLOAT and value.dim() == 4:
            value = value.permute(0, 2, 3, 1)  # as `layout` will leave it
        found[f"value:{name}"] = sample(name, value)
        found[f"shape:{name}"] = np.array(value.shape, np.int64)
    found[OUTPUT] = sample(OUTPUT, output, OUTPUT_VALUES)
    return found


def _outputs_of_modules(denoiser: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The outputs of the model's layers, by the names that `trace` gives them, and of the model itself."""
    found: dict[str, Any] = {}
    twice: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        def record(module: Any, args: Any, output: Any) -> None:
            if name in found:
                twice.add(name)
            if isinstance(output, Tensor):
                found[name] = output.clone()

        return record

    leaves = [(n, m) for n, m in denoiser.module.model.named_modules() if not [*m.children()] and [*m.parameters()]]
    handles = [module.register_forward_hook(hook(name.replace(".", "_"))) for name, module in leaves]
    try:
        output = denoiser(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {n: v for n, v in found.items() if n not in twice} | {OUTPUT: output}


def _quantizes(node: fx.Node) -> bool:
    name = ops.OPS[node.target].name if node.target in ops.OPS else ""
    return "quantize" in name


def _consumers(program: Program, forced: Forced) -> list[str]:
    """The calls with a counterpart that read quantized values or compute in reduced precision, in graph order."""
    noisy: set[fx.Node] = set()
    found = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        reads = any(n in noisy for n in node.all_input_nodes) or _quantizes(node) or "numerics" in node.kwargs
        if node.name in forced.departures:
            if reads:
                found.append(node.name)
        elif reads:
            noisy.add(node)
    return found


def _parts(node: fx.Node) -> tuple[str, ...]:
    """The store names of all parts of a weight."""
    if node.op == "get_attr":
        return (str(node.target),)
    return tuple(name for source in node.all_input_nodes for name in _parts(source))


# --- files --------------------------------------------------------------------------------------------------


def _add_sqnr(found: dict[str, np.ndarray], earlier: list[Dump]) -> None:
    for key in [k for k in found if k.startswith("value:")]:
        node = key.removeprefix("value:")
        shape = tuple(found[f"shape:{node}"].tolist())
        for dump in earlier:
            reference = dump.values.get(node)
            if reference is not None and dump.shapes[node] == shape and reference.dtype == np.float32:
                if found[key].dtype == np.float32:
                    found[f"sqnr:{node}"] = np.array([sqnr(reference, found[key])], np.float32)
                break
    reference = earlier[0].output if earlier else found[OUTPUT]
    alike = reference.shape == found[OUTPUT].shape
    found["output:sqnr"] = np.array([sqnr(reference, found[OUTPUT]) if alike else np.inf], np.float32)
