"""The stages of a compilation as files of Google's Model Explorer: a graph each, and overlays of what layers cost.

`ai-edge-model-explorer` opens them: ``model-explorer 000-trace.json --node_data_paths 000-trace.bits.json``.
"""

from __future__ import annotations

from mpq_compiler.inspection.explorer import Json

OVERLAYS = ("bits", "loss", "bytes", "ms")
GRADIENT = [{"stop": 0, "bgColor": "#00224e"}, {"stop": 0.5, "bgColor": "#707173"}, {"stop": 1, "bgColor": "#fee838"}]
"""Cividis, which is the same to all kinds of colour vision."""


def files(gathered: Json) -> dict[str, Json]:
    """The files of what `explorer.gather` found, by name; overlays only of what is known."""
    layers = {layer["name"]: layer for layer in gathered["layers"]}
    made: dict[str, Json] = {}
    for index, stage in enumerate(gathered["stages"]):
        name = f"{index:03d}-{stage['name']}"
        made[f"{name}.json"] = {"label": stage["told"], "graphs": [_graph(stage)]}
        called = {str(i): layers[n["layer"]] for i, n in enumerate(stage["nodes"]) if n["layer"] in layers}
        for kind in OVERLAYS:
            values = {node: {"value": layer[kind]} for node, layer in called.items() if layer[kind] is not None}
            if values:
                made[f"{name}.{kind}.json"] = {stage["name"]: {"results": values, "gradient": GRADIENT}}
    return made


def _graph(stage: Json) -> Json:
    return {
        "id": stage["name"],
        "nodes": [
            {
                "id": str(index),
                "label": node["operator"],
                "namespace": "/".join(part.replace("/", "-") for part in node["block"]),
                "attrs": [
                    {"key": key, "value": value}
                    for key, value in (("name", node["name"]), ("layer", node["layer"]), ("type", node["type"]))
                    if value
                ],
                "incomingEdges": [{"sourceNodeId": str(read)} for read in node["reads"]],
            }
            for index, node in enumerate(stage["nodes"])
        ],
    }
