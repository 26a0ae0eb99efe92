"""The graph of a stage, read from its text: calls, what they read, the block and the layer that each belongs to.

Dumps and artifacts keep every stage as text (docs/ir.md), so a graph needs neither torch nor the model.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mpq_compiler.support.errors import UserError

CALL = re.compile(r"\s+(?P<names>%\S+(?:, %\S+)*) += (?P<operator>[\w:.]+)(?P<rest>.*)")
REGION = re.compile(r"(?P<parts>\[.*?\]) \{(?P<type>.*)")
ENTRY = re.compile(r"(?:graph )?(?P<name>[\w.-]+)\((?P<inputs>.*?)\)(?: ->.*)? \{")
TYPE = re.compile(r" ((?:\d+ x )?(?:f|bf|i|u)\d+\[[\w,]*\]|bool\[[\w,]*\])")
READ = re.compile(r"%([\w.]+)")
STORED = re.compile(r"(?<![%\w.=])(?:\w+=)?([\w.]*)(?=[:|,)\s]|$)")
PREPARE = "prepare"
"""The function of a lowered stage that lays out weights when an artifact is loaded: no call of a step."""


@dataclass
class Node:
    """A call of a stage, or one of its inputs."""

    name: str
    operator: str
    reads: list[int] = field(default_factory=list)
    """The indices of the nodes that it reads."""
    block: tuple[str, ...] = ()
    """The blocks around it, outermost first; a region of fused calls is the innermost."""
    layer: str | None = None
    """The parameter that it multiplies by."""
    type: str = ""
    text: str = ""
    """Its line, without the columns' spaces."""


def blocks_of(parameters: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The blocks around the modules of parameters, by their flat name, as ``down_blocks_0_resnets_1``.

    A number belongs to the name before it: ``("down_blocks.0", "resnets.1")``.
    """
    found: dict[str, tuple[str, ...]] = {}
    for path in parameters:
        parts: list[str] = []
        for part in path.split(".")[:-2]:  # neither the layer's own module nor its parameter
            if part.isdigit() and parts:
                parts[-1] += f".{part}"
            else:
                parts.append(part)
            found["_".join(parts).replace(".", "_")] = tuple(parts)
    return found


def read(text: str, layers: Mapping[str, str], blocks: Mapping[str, tuple[str, ...]]) -> list[Node]:
    """Reads the graph of a stage.

    Args:
        text: the stage, as a dump or an artifact has it.
        layers: the parameter of each layer, by the names that stand for it: itself and its calls.
        blocks: the blocks by their flat name (`blocks_of`).

    Raises:
        UserError: the text holds no calls.
    """
    nodes: list[Node] = []
    known: dict[str, int] = {}
    region: tuple[str, int] | None = None
    preparing = False

    def add(name: str, operator: str, operands: str, type_: str, line: str) -> None:
        reads = list(dict.fromkeys(known[n] for n in READ.findall(operands) if n in known))
        inner = () if region is None else (region[0],)
        block = _block(name if region is None else region[0].partition(" ")[0], blocks)
        layer = _layer(name, operands, layers)
        known[name] = len(nodes)
        nodes.append(Node(name, operator, reads, block + inner, layer, type_, line))

    for line in text.splitlines():
        if entry := ENTRY.match(line):
            preparing = entry["name"] == PREPARE
            for name in READ.findall(entry["inputs"]) if not preparing else ():
                if name not in known:  # one function's results are another's inputs
                    add(name, "input", "", "", f"input %{name}")
        elif line.strip() == "}":
            if region is not None:
                known[region[0].partition(" ")[0]] = len(nodes) - 1
            region = None
        elif not preparing and (call := CALL.match(line)):
            names = [name.removeprefix("%") for name in call["names"].split(", ")]
            if opened := REGION.match(call["rest"]):
                region = f"{names[0]} {call['operator']}{opened['parts']}", len(nodes)
                continue
            kind = TYPE.search(call["rest"])
            add(names[0], call["operator"], call["rest"], kind[1] if kind else "", " ".join(line.split()))
            known |= dict.fromkeys(names[1:], len(nodes) - 1)
    if not nodes:
        raise UserError("it holds no calls, so it was cut off or altered; write the dumps again")
    _adopt(nodes)
    return nodes


def _adopt(nodes: Sequence[Node]) -> None:
    """Puts calls that the compiler made, such as reshapes, into the block of all that read them."""
    readers: list[list[tuple[str, ...]]] = [[] for _ in nodes]
    for node, own in zip(reversed(nodes), reversed(readers), strict=True):
        if own and not node.block and node.layer is None and node.operator != "input":
            blocks = [tuple(part for part in block if " " not in part) for block in own]  # not into regions
            node.block = tuple(p[0] for p in itertools.takewhile(lambda p: len({*p}) == 1, zip(*blocks, strict=False)))
        for read in node.reads:
            readers[read].append(node.block)


def _block(name: str, blocks: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The innermost block whose flat name begins the node's."""
    cut = len(name)
    while cut > 0:
        if name[:cut] in blocks:
            return blocks[name[:cut]]
        cut = name.rfind("_", 0, cut)
    return ()


def _layer(name: str, operands: str, layers: Mapping[str, str]) -> str | None:
    """The layer whose stored weight a call reads: by its name, or by its own where the text leaves that out."""
    for stored in STORED.findall(operands):
        if stored == ".weight" or not stored:
            stored = name
        if stored in layers:
            return layers[stored]
    return None
