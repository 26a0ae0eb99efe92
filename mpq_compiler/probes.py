"""Dumps: after each pass the program as text, and what its nodes compute.

``NNN-pass.txt`` is `printer.text`, ``decisions.json`` `decisions.document` as far as it goes. ``NNN-pass.safetensors``
is the probe: of runs on a fixed batch of inputs

- ``value:<node>``: at most 64 of its values, at positions drawn from the node's name and shape;
- ``shape:<node>``: its shape, channels last;
- ``sqnr:<node>``: f32 dB of those values against the first dump that has a float node of that name and shape;
- ``output`` and ``output:sqnr``: the same of the output, at up to 4096 positions, against the first dump;
- ``local:<node>``: f64 [6], what the node does wrong by itself, its inputs forced to what they were before the pass
  (`forced.Departure`: largest, noise, share of the elements, departing channels, and the first two of them). Before an
  exact pass that is exact mode, before a simulation the last float program;
- ``expected:<node>``: f64 [1], the noise that the plan stands for at the output of a call on quantized operands;
- ``weight:<parameter>``: f64 [5], noise of the quantized weight: how many times plain rounding's, then relative to the
  layer's output measured and expected, then relative to the weight measured and expected;
- ``rows:<parameter>``: f64 [S, 4], its noisiest rows (`noise.WeightNoise.suspects`);
- ``groups:<parameter>``: f64 [J], how many times plain rounding's noise each K-group has, where there are several;
- ``edge:<edge>``: f64 [4, G], scale and zero point of its time groups, their noise on calibration values and that of
  plain rounding;

and, as the file's metadata, the pass, its contract and the stage, time-group boundaries, the calls of each layer, the
readers of each edge, the calls on quantized operands, and the nodes from which on a rewrite departs and does not
return. `bisect` reads all that.

Equal programs give equal bytes.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from mpq_compiler import artifact, calls, decisions, noise, ops, printer, tensorfile
from mpq_compiler.aten import aten
from mpq_compiler.errors import UserError
from mpq_compiler.exact import ExactInterpreter
from mpq_compiler.forced import ROUNDING, Departure, Forced, always, departure, roots
from mpq_compiler.pass_manager import Contract, Pass
from mpq_compiler.program import Program, Stage, weight_of

VALUES, OUTPUT_VALUES = 64, 4096
OUTPUT = "output"
LOST_DB = -200.0
"""What stands for an output of which nothing is left, as NaN leaves it."""
DEPARTING = 16
"""Nodes named at most of those from which a rewrite departs."""
_FILE = re.compile(r"(\d{3})-([a-z0-9-]+)\.(txt|safetensors)")
_FLOAT_STAGES = (Stage.FLOAT, Stage.REWRITTEN, Stage.PLANNED)


@dataclass(frozen=True)
class Dump:
    """What one pass left behind."""

    index: int
    name: str
    """The pass."""
    text: str
    values: dict[str, np.ndarray]
    """Node -> sampled values, in the order in which the program makes them."""
    sqnr: dict[str, float]
    """Node -> dB against the first dump that has it in floats; infinite where nothing changed."""
    shapes: dict[str, tuple[int, ...]]
    output: np.ndarray
    output_sqnr: float
    """dB against the first dump, infinite where nothing changed."""
    local: dict[str, Departure] = field(default_factory=dict)
    """Node -> what it does wrong by itself, in the order in which the program makes them."""
    expected: dict[str, float] = field(default_factory=dict)
    """Call on quantized operands -> the relative noise that the plan stands for."""
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    groups: dict[str, np.ndarray] = field(default_factory=dict)
    edges: dict[str, np.ndarray] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    """pass, contract, stage, boundaries, order, layers, readers, consumers, departing."""

    @property
    def nodes(self) -> int:
        """Calls in the graph and its regions."""
        return len(self.values)

    @property
    def sqnr_db(self) -> float | None:
        """`output_sqnr`, at least `LOST_DB`; None where the output is the same."""
        return None if self.output_sqnr == math.inf else max(self.output_sqnr, LOST_DB)


def sample(name: str, value: Tensor, count: int = VALUES) -> np.ndarray:
    """``count`` values of a tensor, or all where it has fewer, at positions that its name and shape decide."""
    flat = value.detach().reshape(-1)
    if flat.dtype in (torch.bfloat16, torch.float16):
        flat = flat.to(torch.float32)
    if len(flat) > count:
        seed = zlib.crc32(f"{name} {list(value.shape)}".encode())
        chosen = np.random.Generator(np.random.PCG64(seed)).choice(len(flat), count, replace=False)
        flat = flat[torch.from_numpy(np.sort(chosen))]
    return flat.numpy()


def sqnr_db(reference: np.ndarray, value: np.ndarray) -> float:
    """10 log10 of the signal's power over that of the difference; infinite where there is none."""
    signal = float(np.square(reference.astype(np.float64)).sum())
    error = float(np.square(value.astype(np.float64) - reference.astype(np.float64)).sum())
    if error == 0:
        return float("inf")
    return 10 * float(np.log10(signal / error)) if signal > 0 and np.isfinite(error) else -float("inf")


# --- what is measured ---------------------------------------------------------------------------------------


class Writer:
    """Writes the dumps of one compilation, pass after pass; between them it keeps what the next is compared with.

    denoiser: the model that is traced, against whose layers the first dump is held. None: it is held against nothing.
    """

    def __init__(self, folder: str | Path, inputs: Mapping[str, Tensor], denoiser: Any = None) -> None:
        self.folder, self.inputs, self.denoiser = Path(folder), dict(inputs), denoiser
        self._last: dict[str, Any] = {}
        """Every value of the program before, and its output."""
        self._planned: Program | None = None
        """The last program in floats, with the plans if there are any, and its values."""
        self._float: dict[str, Any] = {}
        self._calls: dict[str, float] = {}
        self._weights: dict[str, tuple[Any, noise.WeightNoise]] = {}
        self._plain: dict[tuple[str, str], noise.Plain] = {}
        """By the store name of what is rounded, and the format."""
        self._sources: dict[str, str] = {}
        """Weight -> store name of what it is rounded from."""
        self._tables: dict[str, tuple[Any, noise.TableNoise | None]] = {}

    def write(self, index: int, step: Pass, program: Program, before: Program) -> None:
        """Writes both files of a pass. Dumps of the same and of later passes that an earlier run left go first.

        Raises UserError where the folder cannot be written.
        """
        folder = self.folder
        found, about = self.probe(step, program, before)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                match = _FILE.fullmatch(path.name)
                if match and int(match[1]) >= index:
                    path.unlink()
            earlier = [d for d in read_dumps(folder) if d.index < index] if index else []
            _add_sqnr(found, earlier)
            stem = f"{index:03d}-{step.name()}"
            metadata = {"mpq": json.dumps(about, separators=(",", ":"), sort_keys=True)}
            text = printer.text(program, step.name()).encode()
            artifact.write_whole(folder / f"{stem}.txt", lambda file: file.write(text))
            artifact.write_whole(folder / f"{stem}.safetensors", lambda file: tensorfile.save(file, found, metadata))
            said = decisions.encode(decisions.document(program))
            artifact.write_whole(folder / artifact.DECISIONS, lambda file: file.write(said))
        except OSError as error:
            raise UserError(
                f"the dumps cannot be written to {folder} ({error.strerror}); name another folder with --dumps"
            ) from error

    @torch.no_grad()
    def probe(self, step: Pass, program: Program, before: Program) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The tensors of a pass's probe file (without SQNRs) and its metadata."""
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
        for name, d in forced.departures.items():
            first, second = (*d.channels, -1, -1)[:2]
            found[f"local:{name}"] = np.array([d.largest, d.noise, d.share, d.departing, first, second])
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
            "readers": {} if self._planned is None else _readers(self._planned),
            "boundaries": program.facts["time-groups"].tolist() if "time-groups" in program.facts else [],
            "decided": decisions.boundaries(program),
        }

    def _forced(self, step: Pass, program: Program, before: Program) -> Forced:
        """How the program is run and what its nodes are held against."""
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
        """The values of the program before, executed in exact mode; a packed one knows no other."""
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
        if program.stage in _FLOAT_STAGES:
            self._planned, self._float = program, self._last

    # ----------------------------------------------------------------------------------------- expected

    def _expected(self, consumers: Sequence[str]) -> dict[str, float]:
        """The noise that the plan stands for at calls on quantized operands, on the float program's values."""
        planned = self._planned
        if planned is None:
            return {}
        nodes = {n.name: n for n in planned.graph.nodes}
        inputs = {n.name: self.inputs[str(n.target)] for n in planned.graph.nodes if n.op == "placeholder"}
        for name in consumers:
            if name not in self._calls and name in nodes:
                values = self._float | inputs
                found = noise.expected_of_call(planned, nodes[name], values, self.inputs["timestep"])
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

    def _noise_of_weights(self, program: Program) -> dict[str, noise.WeightNoise]:
        planned = self._planned
        if planned is None or not program.weights:
            return {}
        sites: dict[str, fx.Node] = {}
        for site in planned.quantizable:
            sites.setdefault(str(weight_of(site)).split(":")[0], site)
        found: dict[str, noise.WeightNoise] = {}
        for layer in calls.layers_of(calls.flatten(program)):
            levels = layer.levels
            if levels is None or levels.path in found or levels.path not in sites:
                continue
            path, node, call = levels.path, layer.call.args[1], sites[levels.path]
            if levels.weight is not None:
                self._sources[path] = levels.weight
            source, planned_format = self._sources.get(path) or str(weight_of(call)), program.weights[path].format
            key = (source, _parts(node), settled := levels.weight is None)
            if self._weights.get(path, (None,))[0] != key:
                weight, gram = program.tensors.read(source), noise.gram_of(planned, call)
                if (source, planned_format) not in self._plain:
                    self._plain[source, planned_format] = noise.plain_rounding(weight, planned_format, gram)
                plain, quantized = self._plain[source, planned_format], noise.constant(program, node)
                self._weights[path] = key, noise.weight_noise(weight, quantized, gram, plain, settled)
            found[path] = self._weights[path][1]
        return found

    def _edge_arrays(self, program: Program) -> dict[str, np.ndarray]:
        found = {}
        for edge, plan in program.activations.items():
            key = (plan, tuple(program.facts["time-groups"].tolist()))
            if self._tables.get(edge, (None,))[0] != key:
                self._tables[edge] = key, noise.table_noise(program, edge, plan)
            table = self._tables[edge][1]
            if table is not None:
                columns = (table.scale, table.zero_point, table.measured, table.expected)
                found[f"edge:{edge}"] = np.stack([c.to(torch.float64).numpy() for c in columns])
        return found


def _run_forced(program: Program, forced: Forced, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[str]]:
    """The output, and the nodes from which on values depart and do not return, each with those before it forced."""
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
    """What the model's layers yield, by the names that `trace` gives them, and the model itself."""
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
    """The calls with a counterpart that read what a quantizer has made, or compute coarsely, in graph order."""
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


def layers(program: Program, planned: Program | None = None) -> dict[str, list[str]]:
    """Parameter -> the calls that multiply with it, in any stage, and those for which they stand."""
    found: dict[str, list[str]] = {}
    for flat in [calls.flatten(p) for p in (program, planned) if p is not None]:
        levels = {made.call.name: made for made in calls.levels_of(flat)}
        for call in flat:
            path = calls.weight_path(call, levels)
            if path is None and call.target is aten.conv2d.default:
                path = calls.stored(call.args[1])
            if path is not None and call.name not in found.setdefault(path, []):
                found[path].append(call.name)
    return found


def _readers(planned: Program) -> dict[str, list[str]]:
    """Edge -> the parameters of the layers that read it."""
    found: dict[str, list[str]] = {}
    for node in planned.quantizable:
        path = str(weight_of(node)).split(":")[0]
        source = node.args[0]
        readers = found.setdefault(getattr(source, "name", ""), [])
        if path not in readers:
            readers.append(path)
    return found


def _parts(node: fx.Node) -> tuple[str, ...]:
    """Store names of everything that a weight is made of."""
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
                    found[f"sqnr:{node}"] = np.array([sqnr_db(reference, found[key])], np.float32)
                break
    reference = earlier[0].output if earlier else found["output"]
    found["output:sqnr"] = np.array([sqnr_db(reference, found["output"])], np.float32)


def read_dumps(folder: str | Path) -> list[Dump]:
    """The dumps of a folder in the order of the passes.

    Raises UserError where the folder holds none, or holds one file of a pass without the other.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder '{folder}'; mpqc compile --dumps writes one")
    stems = {}
    for path in folder.iterdir():
        if match := _FILE.fullmatch(path.name):
            stems[f"{match[1]}-{match[2]}"] = (int(match[1]), match[2])
    if not stems:
        raise UserError(f"'{folder}' holds no dumps (000-trace.txt ...); mpqc compile --dumps writes them")
    return [_read(folder, stem, *stems[stem]) for stem in sorted(stems)]


def _read(folder: Path, stem: str, index: int, name: str) -> Dump:
    try:
        text = (folder / f"{stem}.txt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the dump {folder / stem}.txt cannot be read; write the dumps again") from error
    file = folder / f"{stem}.safetensors"
    tensors = tensorfile.load(file)

    def part(prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): np.asarray(v) for k, v in tensors.items() if k.startswith(prefix)}

    try:
        about = json.loads(tensorfile.metadata(file).get("mpq", ""))
        local, values = part("local:"), part("value:")
        return Dump(
            index,
            name,
            text,
            {node: values[node] for node in about["order"] if node in values},
            {k: float(v[0]) for k, v in part("sqnr:").items()},
            {k: tuple(int(n) for n in v) for k, v in part("shape:").items()},
            np.asarray(tensors[OUTPUT]),
            float(tensors["output:sqnr"][0]),
            {node: _departure_of(local[node]) for node in about["order"] if node in local},
            {k: float(v[0]) for k, v in part("expected:").items()},
            part("weight:"),
            part("rows:"),
            part("groups:"),
            part("edge:"),
            about,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{file} is no probe of a pass; write the dumps again") from error


def _departure_of(row: np.ndarray) -> Departure:
    largest, power, share, departing, *channels = row.tolist()
    return Departure(largest, power, share, tuple(int(c) for c in channels if c >= 0), int(departing))
