"use strict";
// The explorer of `mpqc inspect --html`. The document and each stage are compressed JSON in script tags of their own.

const $ = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

async function unpack(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// --- numbers and colours

const number = (value, digits = 3) =>
  value === null || value === undefined ? ""
    : value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e7) ? value.toExponential(digits - 1)
      : Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(digits)));
const decibels = (value) => (value === null || value === undefined ? "" : value.toFixed(1) + " dB");

// Cividis: ordered by lightness, and the same to all kinds of colour vision.
const CIVIDIS = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120],
  [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]];
function cividis(share) {
  const at = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1), low = Math.min(Math.floor(at), CIVIDIS.length - 2);
  const mixed = CIVIDIS[low].map((c, i) => Math.round(c + (CIVIDIS[low + 1][i] - c) * (at - low)));
  return { fill: `rgb(${mixed})`, ink: share > 0.55 ? "#111" : "#fff" };
}
const SERIES = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377"]; // Paul Tol's bright scheme

const COLOURS = {
  bits: { title: "bits of a weight", log: false, of: "bits" },
  loss: { title: "loss", log: true, of: "loss", sums: true },
  bytes: { title: "bytes", log: true, of: "bytes", sums: true },
  ms: { title: "milliseconds", log: true, of: "ms", sums: true },
  noise: { title: "noise of the layer, dB", log: false, of: "noise" },
  sqnr: { title: "SQNR so far, dB", log: false, of: "sqnr" },
};

// Where values lie between the least and the largest, 0 to 1; null for what has none.
function scale(values, log) {
  const known = values.filter((v) => v !== null && v !== undefined && (!log || v > 0));
  const at = (v) => (log ? Math.log10(v) : v);
  const low = Math.min(...known), high = Math.max(...known);
  const share = (v) => (v === null || v === undefined || (log && v <= 0) ? null
    : high > low ? (at(v) - at(low)) / (at(high) - at(low)) : 0.5);
  return { low, high, share, empty: !known.length };
}

function legend(box, title, scaled) {
  const stops = CIVIDIS.map((c) => `rgb(${c})`).join(",");
  box.replaceChildren(...(scaled.empty ? [`${title}: not known here`]
    : [`${title}: ${number(scaled.low)}`, make("i", { style: `background:linear-gradient(90deg,${stops})` }), number(scaled.high)]));
}

// --- tables and charts

function table(into, heads, rows, options = {}) {
  // heads: [title, numeric]; a row: its cells, or {cells, ...attributes}
  const head = make("tr", {}, ...heads.map(([title, numeric]) => make("th", { class: numeric && "n" }, title)));
  const body = rows.map((row) => {
    const { cells, ...attributes } = Array.isArray(row) ? { cells: row } : row;
    return make("tr", attributes, ...cells.map((cell, i) => make("td", { class: heads[i][1] && "n" }, cell ?? "")));
  });
  into.replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
  if (options.class) into.className = options.class;
  return into;
}

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Axes of a chart. An axis: {low, high, log, title, ticks}; returns the drawing and where values lie on it.
function chart(x, y, width = 520, height = 240) {
  const left = 58, right = 12, top = 12, bottom = 40;
  const share = (axis, v) => (axis.log ? Math.log(v / axis.low) / Math.log(axis.high / axis.low)
    : (v - axis.low) / (axis.high - axis.low || 1));
  const across = (v) => left + share(x, v) * (width - left - right);
  const up = (v) => height - bottom - share(y, v) * (height - top - bottom);
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${y.title} over ${x.title}` });
  const ticks = (axis) => {
    if (axis.ticks) return axis.ticks;
    if (axis.log) {
      const powers = [];
      for (let e = Math.ceil(Math.log10(axis.low)); e <= Math.log10(axis.high); e++) powers.push(10 ** e);
      return powers;
    }
    const step = 10 ** Math.floor(Math.log10((axis.high - axis.low) / 3 || 1)), wide = (axis.high - axis.low) / step;
    const each = step * (wide > 20 ? 10 : wide > 10 ? 5 : wide > 5 ? 2 : 1), found = [];
    for (let v = Math.ceil(axis.low / each) * each; v <= axis.high + 1e-9 * each; v += each) found.push(Number(v.toPrecision(6)));
    return found;
  };
  for (const v of ticks(x)) {
    drawn.append(svg("line", { class: "axis", x1: across(v), x2: across(v), y1: top, y2: height - bottom }),
      svg("text", { x: across(v), y: height - bottom + 15, "text-anchor": "middle" }, x.names ? x.names[v] : number(v)));
  }
  for (const v of ticks(y)) {
    drawn.append(svg("line", { class: "axis", x1: left, x2: width - right, y1: up(v), y2: up(v) }),
      svg("text", { x: left - 6, y: up(v) + 4, "text-anchor": "end" }, number(v)));
  }
  drawn.append(svg("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, x.title),
    svg("text", { x: 12, y: (top + height - bottom) / 2, "text-anchor": "middle",
      transform: `rotate(-90 12 ${(top + height - bottom) / 2})` }, y.title));
  const line = (points, colour, wide = 1.5) => drawn.append(svg("polyline", { fill: "none", stroke: colour,
    "stroke-width": wide, points: points.map(([a, b]) => `${across(a)},${up(b)}`).join(" ") }));
  const dot = (a, b, colour, said) => drawn.append(svg("circle", { cx: across(a), cy: up(b), r: 4, fill: colour },
    svg("title", {}, said)));
  return { drawn, across, up, line, dot, bottom: height - bottom, text: (a, b, said, anchor = "end") =>
    drawn.append(svg("text", { x: across(a), y: up(b) - 5, "text-anchor": anchor }, said)) };
}

// --- the document

const state = { version: 0, stage: 0, colour: "bits", open: new Set(), selected: null, layer: null, sort: null, down: true };
let versions, layers, cy, nodes, shown;
const stages = new Map(); // the stages that were opened, by version and place
const layer = (name, version = state.version) => layers[version].get(name);

async function stageNodes(version, place) {
  const id = `stage-${version}-${place}`;
  if (!stages.has(id)) stages.set(id, await unpack(id));
  return stages.get(id);
}

function stageOptions(select, chosen) {
  select.replaceChildren(...versions.map((version, v) => {
    const made = version.stages.map((stage, i) => make("option", { value: `${v} ${i}`, selected: `${v} ${i}` === chosen },
      stage.name + (stage.sqnr_db === null ? "" : ` (${stage.sqnr_db.toFixed(1)} dB)`)));
    return versions.length > 1 ? make("optgroup", { label: version.source }, ...made) : made;
  }).flat());
}

// --- the graph

const key = (block, depth) => block.slice(0, depth).join("/");
const short = (part) => part.slice(part.indexOf(" ") + 1); // of a region the operators; its name makes it unique

// The node or folded block that stands for a node: the outermost block around it that is not open.
function standing(node, index) {
  for (let depth = 1; depth <= node.block.length; depth++) {
    const name = key(node.block, depth);
    if (!state.open.has(name)) return { id: "b:" + name, parent: depth > 1 ? "b:" + key(node.block, depth - 1) : null, part: node.block[depth - 1] };
  }
  return { id: "n:" + index, parent: node.block.length ? "b:" + key(node.block, node.block.length) : null, node };
}

function ownName(node) {
  const outer = node.block.filter((part) => !part.includes(" ")).join("_").replaceAll(".", "_");
  return outer && node.name.startsWith(outer + "_") ? node.name.slice(outer.length + 1) : node.name;
}

// What is visible now: groups with their members, parents, and the edges between them.
function visible() {
  const groups = new Map(), places = [];
  nodes.forEach((node, index) => {
    const found = standing(node, index);
    if (!groups.has(found.id)) groups.set(found.id, { ...found, members: [], readers: new Set(), reads: new Set() });
    groups.get(found.id).members.push(index);
    places.push(found.id);
  });
  nodes.forEach((node, index) => node.reads.forEach((read) => {
    if (places[read] !== places[index]) {
      groups.get(places[read]).readers.add(places[index]);
      groups.get(places[index]).reads.add(places[read]);
    }
  }));
  return groups;
}

// The value of a group that colours show: of its layers the sum, or the mean over their weights.
function valueOf(members) {
  const colour = COLOURS[state.colour];
  if (state.colour === "sqnr") return nodes[members.at(-1)].sqnr;
  const own = [...new Set(members.map((i) => nodes[i].layer).filter((n) => n))].map((n) => layer(n))
    .filter((l) => l && l[colour.of] !== null);
  let rest = null;
  if (state.colour === "ms") {
    const names = new Set(members.map((i) => nodes[i].name));
    const timed = versions[state.version].kernels.filter((k) => !k.layer && names.has(k.node));
    rest = timed.length ? timed.reduce((sum, k) => sum + k.ms, 0) : null;
  }
  if (!own.length) return rest;
  const total = own.reduce((sum, l) => sum + l[colour.of] * (colour.sums ? 1 : l.weights), 0);
  return colour.sums ? total + (rest ?? 0) : total / own.reduce((sum, l) => sum + l.weights, 0);
}

const MOST_READERS = 8; // edges of a value that more groups read would hide all others

function draw(fit = true) {
  shown = visible();
  const graph = new dagre.graphlib.Graph({ compound: true }).setGraph({ nodesep: 14, ranksep: 26, marginx: 10, marginy: 10 });
  graph.setDefaultEdgeLabel(() => ({}));
  const values = new Map([...shown].map(([id, group]) => [id, valueOf(group.members)]));
  const scaled = scale([...values.values()], COLOURS[state.colour].log);
  const elements = [], parents = new Set(), silent = [];
  const addParent = (id) => {
    if (!id || parents.has(id)) return;
    parents.add(id);
    const parts = id.slice(2).split("/"), above = parts.length > 1 ? "b:" + parts.slice(0, -1).join("/") : null;
    addParent(above);
    graph.setNode(id, {});
    if (above) graph.setParent(id, above);
    elements.push({ data: { id, parent: above ?? undefined, label: short(parts.at(-1)) }, classes: "open" });
  };
  for (const [id, group] of shown) {
    addParent(group.parent);
    const share = scaled.share(values.get(id)), colour = share === null ? { fill: style("--none"), ink: style("--ink") } : cividis(share);
    const name = group.node ? ownName(group.node) : short(group.part);
    const second = group.node ? group.node.operator.replace(/^\w+(::|\.)/, "") : `${group.members.length} calls`;
    const value = values.get(id) === null || values.get(id) === undefined ? "" : ` · ${number(values.get(id))}`;
    const label = `${name.length > 34 ? "…" + name.slice(-33) : name}\n${second}${value}`;
    const size = { width: Math.max(...label.split("\n").map((l) => l.length)) * 6.3 + 18, height: 36 };
    graph.setNode(id, size);
    if (group.parent) graph.setParent(id, group.parent);
    elements.push({ data: { id, parent: group.parent ?? undefined, label, ...size, fill: colour.fill, ink: colour.ink },
      classes: group.node ? "call" : "block" });
  }
  for (const [id, group] of shown) {
    if (group.readers.size > MOST_READERS) { silent.push(group.node ? group.node.name : short(group.part)); continue; }
    for (const reader of group.readers) {
      graph.setEdge(id, reader);
      elements.push({ data: { id: `${id}>${reader}`, source: id, target: reader } });
    }
  }
  dagre.layout(graph);
  for (const element of elements) {
    if (element.data.source || element.classes === "open") continue;
    const { x, y } = graph.node(element.data.id);
    element.position = { x, y };
  }
  cy.startBatch();
  cy.elements().remove();
  cy.add(elements);
  cy.endBatch();
  if (fit) overview();
  if (state.selected && cy.getElementById(state.selected).length) cy.getElementById(state.selected).select();
  legend($("scale"), COLOURS[state.colour].title + (state.colour === "ms" ? ` (${versions[state.version].time})` : ""), scaled);
  $("left-out").textContent = silent.length ? `edges not drawn, of values with many readers: ${silent.join(", ")}` : "";
}

// All of it where names stay readable, else its beginning.
function overview() {
  cy.fit(undefined, 20);
  if (cy.zoom() < 0.55) {
    cy.zoom(0.8);
    const box = cy.elements().boundingBox();
    cy.pan({ x: cy.width() / 2 - (box.x1 + box.x2) / 2 * 0.8, y: 20 - box.y1 * 0.8 });
  }
}

function styles() {
  const ink = style("--ink"), line = style("--line"), accent = style("--accent"), quiet = style("--quiet");
  return [
    { selector: "node", style: { shape: "round-rectangle", label: "data(label)", "font-size": 11, "text-wrap": "wrap",
      "font-family": "system-ui, sans-serif", "border-width": 1, "border-color": quiet } },
    { selector: "node[fill]", style: { width: "data(width)", height: "data(height)", "background-color": "data(fill)",
      color: "data(ink)", "text-valign": "center" } },
    { selector: ".block", style: { "border-width": 2, "border-style": "double", "border-color": ink } },
    { selector: ".open", style: { "background-color": ink, "background-opacity": 0.05, color: quiet, "text-valign": "top",
      "border-color": line, padding: 10 } },
    { selector: ":selected", style: { "border-width": 4, "border-style": "solid", "border-color": accent } },
    { selector: "edge", style: { width: 1.2, "line-color": quiet, "target-arrow-color": quiet, "target-arrow-shape": "triangle",
      "arrow-scale": 0.8, "curve-style": "bezier", opacity: 0.7 } },
  ];
}

function toggle(id) {
  const name = id.slice(2);
  if (state.open.has(name)) {
    for (const other of [...state.open]) if (other === name || other.startsWith(name + "/")) state.open.delete(other);
  } else state.open.add(name);
  state.selected = id;
  draw();
  if (cy.getElementById(id).length) cy.center(cy.getElementById(id));
}

const MOST_SHOWN = 1500; // more would take seconds to lay out, and nobody could read it

function unfold() {
  const more = [...shown.values()].filter((group) => !group.node).map((group) => group.id.slice(2));
  more.forEach((name) => state.open.add(name));
  const count = visible().size;
  if (count > MOST_SHOWN) {
    more.forEach((name) => state.open.delete(name));
    $("left-out").textContent = `that would show ${count} calls: unfold the blocks of interest by a double click`;
  } else draw();
}

function selectNode(index) {
  nodes[index].block.forEach((_, i) => state.open.add(key(nodes[index].block, i + 1)));
  state.selected = "n:" + index;
  draw(false);
  const found = cy.getElementById(state.selected);
  cy.zoom(Math.max(cy.zoom(), 0.9));
  cy.center(found);
  detail(state.selected);
}

function detail(id) {
  const box = $("detail");
  if (!id) {
    const stage = versions[state.version].stages[state.stage];
    box.replaceChildren(make("h2", {}, stage.name), make("p", {}, stage.told),
      make("p", { class: "quiet" }, "Click a call or a block to read of it; a double click folds and unfolds blocks."));
    return;
  }
  if (id.startsWith("n:")) {
    const node = nodes[Number(id.slice(2))];
    box.replaceChildren(make("h2", {}, node.name), make("p", {}, make("code", {}, node.text)));
    if (node.sqnr !== null) box.append(make("p", {}, `SQNR here: ${decibels(node.sqnr)}`));
    if (node.layer && layer(node.layer)) box.append(...explained(layer(node.layer), versions[state.version]));
    return;
  }
  const name = id.slice(2), members = nodes.filter((node) => key(node.block, name.split("/").length) === name);
  const own = [...new Set(members.map((n) => n.layer))].map((n) => layer(n)).filter((l) => l);
  const sum = (of) => (own.some((l) => l[of] !== null) ? own.reduce((s, l) => s + (l[of] ?? 0), 0) : null);
  const facts = { calls: members.length, layers: own.length, weights: sum("weights"), bytes: sum("bytes"), loss: sum("loss"), ms: sum("ms") };
  if (facts.bytes && facts.weights) facts["bits of a weight"] = 8 * facts.bytes / facts.weights;
  box.replaceChildren(make("h2", {}, name.split("/").map(short).join(" / ")),
    make("button", { onclick: () => toggle(id) }, state.open.has(name) ? "Fold" : "Unfold"),
    make("dl", {}, ...Object.entries(facts).filter(([, v]) => v !== null).flatMap(([k, v]) => [make("dt", {}, k), make("dd", {}, number(v))])));
}

// --- a layer

function explained(found, version) {
  const parts = [make("h3", {}, `${found.name}: ${found.format}, activation ${found.activation}`),
    make("ul", {}, ...found.told.map((said) => make("li", {}, said)))];
  if (found.choices.length) {
    parts.push(make("h3", {}, "what each format would cost"),
      table(make("table"), [["format"], ["bytes", 1], ["loss", 1], ["ms", 1], ["saves per kB", 1]], found.choices.map((row) => ({
        class: row.chosen && "chosen",
        cells: [row.format, number(row.bytes), number(row.loss), number(row.ms), row.saves === null ? "" : number(1e3 * row.saves)] }))));
    if (found.price) parts.push(make("p", { class: "quiet" }, `a kilobyte is worth a loss of ${number(1e3 * found.price)} elsewhere`));
  }
  if (found.histogram) {
    parts.push(make("h3", {}, "the weight, and the levels of a row of it"), histogram(found.histogram),
      make("p", { class: "quiet" }, "bars: as it is quantized; ticks: levels" + (found.histogram.float ? "; line: in the float model" : "")));
    if (!version.layers.some((l) => l.histogram?.float)) parts.push(make("p", { class: "quiet" }, version.missing.float));
  } else parts.push(make("p", { class: "quiet" }, version.missing.histogram));
  if (found.ranges) parts.push(make("h3", {}, "range of its input over time"), ranges(found, version));
  const noises = found.noises.filter((row) => row.own_db !== null || row.sqnr_db !== null);
  if (noises.length) {
    parts.push(make("h3", {}, "noise after each pass"),
      table(make("table"), [["pass"], ["own", 1], ["planned", 1], ["SQNR so far", 1]], noises.map((row) =>
        [row.pass, decibels(row.own_db), decibels(row.planned_db), decibels(row.sqnr_db)])));
  }
  return parts;
}

function histogram({ counts, ends, levels, float }) {
  const [low, high] = ends, wide = (high - low) / counts.length;
  const c = chart({ low, high, title: "value" }, { low: 0, high: Math.max(...counts, ...(float ?? [])), title: "weights" }, 380, 190);
  counts.forEach((count, i) => c.drawn.append(svg("rect", { class: "bar", x: c.across(low + i * wide), width: c.across(wide) - c.across(0),
    y: c.up(count), height: c.bottom - c.up(count), fill: SERIES[0] }, svg("title", {}, `${number(low + i * wide)}: ${count}`))));
  if (float) c.line([[low, 0], ...float.flatMap((count, i) => [[low + i * wide, count], [low + (i + 1) * wide, count]]), [high, 0]], "currentColor");
  levels.forEach((level) => c.drawn.append(svg("line", { class: "level", x1: c.across(level), x2: c.across(level), y1: c.bottom - 9, y2: c.bottom,
    stroke: SERIES[1], "stroke-width": 2 }, svg("title", {}, `level ${number(level)}`))));
  return c.drawn;
}

function ranges(found, version) {
  const cuts = version.boundaries, known = found.ranges.filter((r) => r);
  const last = Math.max(1000, ...cuts), edges = [0, ...cuts, last];
  const low = Math.min(0, ...known.map((r) => r[0])), high = Math.max(0, ...known.map((r) => r[1]));
  const c = chart({ low: 0, high: last, title: "timestep" }, { low, high, title: "value" }, 380, 190);
  found.ranges.forEach((r, g) => {
    if (!r || g + 1 >= edges.length) return;
    c.drawn.append(svg("rect", { x: c.across(edges[g]), width: c.across(edges[g + 1]) - c.across(edges[g]) - 1, y: c.up(r[1]),
      height: Math.max(1, c.up(r[0]) - c.up(r[1])), fill: SERIES[0], opacity: 0.75 },
    svg("title", {}, `group ${g}: ${number(r[0])} .. ${number(r[1])}`)));
  });
  return c.drawn;
}

// --- the table of layers

const COLUMNS = [["layer", "name"], ["weight", "format"], ["activation", "activation"], ["bits", "bits", 1], ["bytes", "bytes", 1],
  ["share, %", "share", 1], ["loss", "loss", 1], ["ms", "ms", 1], ["noise, dB", "noise", 1]];

function showLayers() {
  const asked = $("filter").value.toLowerCase();
  const total = versions[0].layers.reduce((sum, l) => sum + (l.bytes ?? 0), 0);
  const columns = COLUMNS.filter(([, of]) => of === "share" || versions[0].layers.some((l) => l[of] !== null));
  const get = (l, of) => (of === "share" ? (100 * (l.bytes ?? 0)) / total
    : of === "activation" ? l[of].replace(/ in (\d+) time groups/, "/t$1").replace(" with a scale for each token", "/token") : l[of]);
  let rows = versions[0].layers.filter((l) => `${l.name} ${l.format} ${l.activation}`.toLowerCase().includes(asked));
  if (state.sort) {
    const sign = state.down ? -1 : 1;
    rows = [...rows].sort((a, b) => {
      const [x, y] = [get(a, state.sort), get(b, state.sort)];
      if (x === null || y === null) return (x === null) - (y === null); // what has no value comes last
      return sign * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
    });
  }
  const other = versions.length > 1 ? [["weight", "format"], ["bytes", "bytes", 1], ["loss", "loss", 1]] : [];
  const sorts = ([title, of, numeric]) => make("th", { class: numeric && "n", scope: "col",
    "aria-sort": state.sort === of ? (state.down ? "descending" : "ascending") : "none" },
  make("button", { "data-sort": of, onclick: () => {
    state.down = state.sort === of ? !state.down : Boolean(numeric);
    state.sort = of;
    showLayers();
  } }, title + (state.sort === of ? (state.down ? " ↓" : " ↑") : "")));
  const body = rows.map((l) => {
    const second = versions.length > 1 ? layer(l.name, 1) : null;
    const cells = [...columns.map(([, of, numeric]) => [numeric, numeric ? number(get(l, of)) : get(l, of)]),
      ...other.map(([, of, numeric]) => [numeric, !second ? "" : numeric ? number(second[of]) : second[of]])];
    const look = () => {
      state.layer = l.name;
      $("layers").querySelectorAll("tr[aria-selected]").forEach((row) => row.removeAttribute("aria-selected"));
      made.setAttribute("aria-selected", "true");
      showWhy();
    };
    const made = make("tr", { tabindex: 0, "data-layer": l.name, "aria-selected": l.name === state.layer && "true", onclick: look,
      onkeydown: (event) => event.key === "Enter" && look() }, ...cells.map(([numeric, cell]) => make("td", { class: numeric && "n" }, cell ?? "")));
    return made;
  });
  $("layers").replaceChildren(make("thead", {}, make("tr", {}, ...columns.map(sorts),
    ...other.map(([title, , numeric]) => make("th", { class: numeric && "n" }, `${title}, second`)))), make("tbody", {}, ...body));
  $("count").textContent = `${rows.length} of ${versions[0].layers.length} layers`;
}

function showWhy() {
  $("why").replaceChildren(...ofEach((version, v) => (layer(state.layer, v) ? explained(layer(state.layer, v), version) : [])),
    make("button", { onclick: () => lookUp(state.layer) }, "Show in the graph"));
}

function lookUp(name) {
  const index = nodes.findIndex((node) => node.layer === name);
  view("graph");
  if (index >= 0) selectNode(index);
}

// --- the other views

const absent = (version, name, fallback = "nothing is known of that here") =>
  [make("p", { class: "note" }, version.missing[name] ?? fallback)];

// What is shown of every compilation, under its source where there are two.
const ofEach = (show) => versions.flatMap((version, v) => {
  const shownOfIt = show(version, v);
  return shownOfIt.length && versions.length > 1 ? [make("h2", { class: "source" }, version.source), ...shownOfIt] : shownOfIt;
});

function heat(rows, columns, value, cell, options) {
  const scaled = scale(options.values ?? rows.flatMap((row) => columns.map((column) => value(row, column))), options.log);
  const box = make("span", { class: "scale" });
  legend(box, options.title, scaled);
  const made = make("table", { class: "heat" }, make("thead", {}, make("tr", {}, make("th", {}, "layer"), ...columns.map((c) => make("th", {}, options.head(c))))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, make("th", { title: row.name }, row.name), ...columns.map((column) => {
      const v = value(row, column), share = scaled.share(v), colour = share === null ? null : cividis(share);
      const { text, ...attributes } = cell(row, column, v);
      return make("td", { ...attributes, style: colour && `background:${colour.fill};color:${colour.ink}` }, text);
    })))));
  return [make("div", { class: "tools" }, box), made];
}

function showFormats(box) {
  const values = versions.flatMap((version) => version.layers.flatMap((l) => l.choices.map((c) => c.loss))); // one scale for both
  box.replaceChildren(...ofEach((version) => {
    const rows = version.layers.filter((l) => l.choices.length);
    if (!rows.length) return absent(version, "formats");
    const sizes = new Map(); // formats in the order of the bits that they take
    rows.forEach((l) => l.choices.forEach((c) => sizes.set(c.format, Math.min(sizes.get(c.format) ?? Infinity, c.bytes / (l.weights || 1)))));
    const columns = [...sizes.keys()].sort((a, b) => sizes.get(a) - sizes.get(b));
    const of = new Map(rows.map((l) => [l, new Map(l.choices.map((c) => [c.format, c]))]));
    return [make("h2", {}, "loss of each layer in each format"), make("p", { class: "quiet" }, "Outlined: what the allocation took."),
      ...heat(rows, columns, (l, c) => of.get(l).get(c)?.loss ?? null, (l, c, v) => {
        const choice = of.get(l).get(c);
        return { text: v === null ? "" : number(v, 2), class: choice?.chosen && "chosen",
          title: choice && `${l.name} as ${c}: loss ${number(v)}, ${number(choice.bytes)} bytes` };
      }, { log: true, title: "loss", head: (c) => c, values })];
  }));
}

function showRanges(box) {
  box.replaceChildren(...ofEach((version) => {
    const rows = version.layers.filter((l) => l.ranges), cuts = version.boundaries;
    if (!rows.length) return absent(version, "ranges", "no ranges were calibrated: mpqc compile records them");
    const groups = rows[0].ranges.map((_, g) => g), wide = (r) => (r ? r[1] - r[0] : null);
    const edges = ["0", ...cuts.map((b) => number(b, 4)), ""];
    return [make("h2", {}, "range of each layer's input, by time group"),
      make("p", { class: "quiet" }, "The width of a group's range over the widest of the layer's."),
      ...heat(rows, groups, (l, g) => (wide(l.ranges[g]) === null ? null : wide(l.ranges[g]) / (Math.max(...l.ranges.map(wide)) || 1)),
        (l, g, v) => ({ text: v === null ? "" : number(v, 2), title: l.ranges[g] && `${number(l.ranges[g][0])} .. ${number(l.ranges[g][1])}` }),
        { log: false, title: "share of the widest", head: (g) => `t ${edges[g]} ${edges[g + 1] ? ".. " + edges[g + 1] : "and on"}` })];
  }));
}

function showPrices(box) {
  box.replaceChildren(...ofEach((version) => {
    if (!version.prices.length) return absent(version, "prices");
    const units = { bytes: [1e3, "kilobyte"], latency: [1e3, "millisecond"] };
    return version.prices.flatMap((budget) => {
      const [many, unit] = units[budget.cost] ?? [1, `unit of ${budget.cost}`];
      const moved = (title, solved) => {
        if (!solved) return [make("h3", {}, title), make("p", {}, "cannot be met")];
        const gain = budget.loss - solved.loss;
        return [make("h3", {}, title), make("p", {}, `loss ${number(budget.loss)} → ${number(solved.loss)} (${gain > 0 ? "−" : "+"}`
            + `${Math.abs((100 * gain) / budget.loss).toFixed(1)} %); ${solved.changed.length || "no"} layers change`),
        ...(solved.changed.length ? [table(make("table"), [["layer"], ["now"], ["then"]], solved.changed.map(([l, a, b]) => [l.replace(/\.weight$/, ""), a, b]))] : [])];
      };
      return [make("h2", {}, `${budget.cost}: ${number(budget.used)} used of ${number(budget.max)}, ${budget.binding ? "binding" : "not binding"}`),
        make("p", { class: "price" }, `a ${unit} is worth a loss of ${number(many * budget.price)}`),
        make("div", { class: "row" }, make("div", { class: "more" }, ...moved("the next 5 % would buy", budget.more)),
          make("div", { class: "less" }, ...moved("5 % less would cost", budget.less)))];
    });
  }));
}

function showPasses(box) {
  const measured = versions.map((v) => v.stages.map((s, i) => [i, s]).filter(([, s]) => s.sqnr_db !== null));
  if (!measured.some((m) => m.length)) return box.replaceChildren(...absent(versions[0], "passes"));
  const all = measured.flat().map(([, s]) => s.sqnr_db);
  const c = chart({ low: 0, high: Math.max(...versions.map((v) => v.stages.length - 1)), title: "stage" },
    { low: Math.min(...all) - 1, high: Math.max(...all) + 1, title: "SQNR of the output, dB" }, 820, 260);
  measured.forEach((m, v) => {
    c.line(m.map(([i, s]) => [i, s.sqnr_db]), SERIES[v]);
    m.forEach(([i, s]) => c.dot(i, s.sqnr_db, SERIES[v], `${versions[v].source} after ${s.name}: ${decibels(s.sqnr_db)}`));
  });
  box.replaceChildren(make("h2", {}, "SQNR of the output after each pass"), c.drawn, ...versions.map((v) =>
    table(make("table"), [["", 1], ["pass"], ["stage"], ["SQNR", 1], [""]], v.stages.map((s, i) => [String(i), s.name, s.stage, decibels(s.sqnr_db), s.told]))));
}

function showKernels(box) {
  const known = versions.map(({ kernels }) => kernels.filter((k) => k.macs && k.bytes && k.ms)), every = known.flat();
  const at = (k) => k.macs / k.bytes, speed = (k) => k.macs / k.ms / 1e6; // the axes and colours of all are the same
  const roofs = versions.map(({ peak }) => (peak ? [["8-bit integers", peak.gmacs], ["f32", peak.float_gmacs]].filter(([, top]) => top && peak.gbytes) : []));
  const knees = versions.flatMap(({ peak }, v) => roofs[v].map(([, top]) => top / peak.gbytes)), tops = roofs.flat().map(([, top]) => top);
  const x = { low: Math.min(...every.map(at), ...knees) / 2, high: Math.max(...every.map(at), ...knees) * 2, log: true, title: "multiply-accumulates for each byte" };
  const y = { low: Math.min(...every.map(speed)) / 2, high: Math.max(...every.map(speed), ...tops) * 2, log: true, title: "GMAC/s" };
  const kinds = [...new Set(every.map((k) => k.template))], colour = (kind) => SERIES[kinds.indexOf(kind) % SERIES.length];
  box.replaceChildren(...ofEach((version, v) => {
    const { kernels, peak } = version;
    if (!known[v].length) return absent(version, "kernels");
    const c = chart(x, y, 900, 420);
    roofs[v].forEach(([name, top]) => {
      const first = Math.max(x.low, y.low / peak.gbytes);
      c.line([[first, first * peak.gbytes], [top / peak.gbytes, top], [x.high, top]], "currentColor");
      c.text(x.high, top, name);
    });
    known[v].forEach((k) => c.dot(at(k), speed(k), colour(k.template),
      `${(k.layer ?? k.node).replace(/\.weight$/, "")}: ${number(k.ms)} ms, ${number(speed(k))} GMAC/s`));
    const keys = kinds.map((kind) => make("span", {}, make("span", { style: `color:${colour(kind)}` }, "● "), kind));
    const slow = [...kernels].sort((a, b) => b.ms - a.ms).slice(0, 40);
    return [make("h2", {}, `kernels under the roofs of ${peak.cpu}`), make("div", { class: "tools" }, ...keys), c.drawn,
      make("h3", {}, "those that take longest"), table(make("table"), [["layer or call"], ["kind"], ["ms", 1], ["share", 1], ["GMAC/s", 1]],
        slow.map((k) => [(k.layer ?? k.node).replace(/\.weight$/, ""), k.template, number(k.ms), (100 * k.share).toFixed(1) + " %", number(k.gmacs)]))];
  }));
}

function showSamples(box) {
  const parts = ofEach(({ samples }) => (samples ? [make("p", { class: "quiet" }, samples.told), make("div", { class: "row" },
    ...["float", "compiled", "difference"].map((kind) => make("figure", {}, make("img", { src: samples[kind], alt: kind }), make("figcaption", {}, kind))))] : []));
  if (!parts.length) parts.push(...absent(versions[0], "samples"));
  else parts.unshift(make("h2", {}, "the same noise, drawn by the float model and by what was compiled"));
  box.replaceChildren(...parts);
}

function showScores(box) {
  box.replaceChildren(...ofEach((version) => {
    const charts = Object.entries(version.scores);
    if (!charts.length) return absent(version, "scores", "nothing was scored: mpqc compile --recipe qua2sedimo does");
    return charts.flatMap(([title, drawing]) => {
      const made = make("div");
      made.innerHTML = drawing; // SVG of the compiler's own, its names escaped
      return [make("h2", {}, `scores and formats by ${title}`), made];
    });
  }));
}

// --- the difference of two stages

const MOST_LINES = 600;

async function showDiff() {
  const [a, b] = await Promise.all([$("before"), $("after")].map((select) => stageNodes(...select.value.split(" ").map(Number))));
  const old = new Map(a.map((node) => [node.name, node])), now = new Set(b.map((node) => node.name));
  const rows = [];
  let at = 0;
  const gone = (until) => { // calls that are there no more stand where they stood
    for (; at < until; at++) if (!now.has(a[at].name)) rows.push(["gone", a[at].text, ""]);
  };
  const places = new Map(a.map((node, i) => [node.name, i]));
  for (const node of b) {
    const was = old.get(node.name);
    if (was) gone(places.get(node.name));
    rows.push(!was ? ["new", "", node.text] : was.text === node.text ? ["same", was.text, node.text] : ["changed", was.text, node.text]);
  }
  gone(a.length);
  const counts = Object.fromEntries(["gone", "new", "changed", "same"].map((kind) => [kind, rows.filter((r) => r[0] === kind).length]));
  $("changes").textContent = `${counts.changed} changed, ${counts.new} new, ${counts.gone} gone, ${counts.same} the same`;
  const wanted = rows.filter(([kind]) => $("all-lines").checked || kind !== "same");
  $("diff").replaceChildren(wanted.length ? table(make("table"), [["before"], ["after"]],
    wanted.slice(0, MOST_LINES).map(([kind, x, y]) => ({ class: kind, cells: [x, y] })), { class: "code" })
    : make("p", { class: "note" }, "no difference"));
  if (wanted.length > MOST_LINES) $("diff").append(make("p", { class: "note" }, `and ${wanted.length - MOST_LINES} more`));
}

// --- the views

const VIEWS = { graph: ["Graph"], layers: ["Layers", showLayers], formats: ["Formats", showFormats], prices: ["Prices", showPrices],
  ranges: ["Ranges", showRanges], diff: ["Difference", showDiff], passes: ["Passes", showPasses], kernels: ["Kernels", showKernels],
  samples: ["Samples", showSamples], scores: ["Scores", showScores] };
const drawn = new Set(["graph"]);

function view(name) {
  for (const other of Object.keys(VIEWS)) {
    $("view-" + other).hidden = other !== name;
    $("tab-" + other).setAttribute("aria-selected", String(other === name));
  }
  if (!drawn.has(name)) VIEWS[name][1]($("view-" + name));
  drawn.add(name);
  if (name === "graph") cy.resize();
}

async function openStage() {
  [state.version, state.stage] = $("stage").value.split(" ").map(Number);
  nodes = await stageNodes(state.version, state.stage);
  state.selected = null;
  draw();
  detail(null);
}

function search() {
  const asked = $("search").value.trim().toLowerCase();
  const found = asked ? nodes.map((node, index) => [node, index]).filter(([node]) =>
    `${node.name} ${node.layer ?? ""} ${node.operator}`.toLowerCase().includes(asked)).slice(0, 30) : [];
  $("matches").replaceChildren(...found.map(([node, index]) => make("li", { "data-index": index, onclick: () => {
    $("matches").hidden = true;
    selectNode(index);
  } }, `${node.layer ?? node.name} · ${node.operator}`)));
  $("matches").hidden = !found.length;
}

async function start() {
  versions = await unpack("document");
  layers = versions.map((version) => new Map(version.layers.map((l) => [l.name, l])));
  $("summary").append(...versions.map((v) => make("div", {}, (versions.length > 1 ? `${v.source}: ` : "") + v.told.join("; "))));
  document.querySelector("nav").append(...Object.entries(VIEWS).map(([name, [title]]) =>
    make("button", { id: "tab-" + name, role: "tab", onclick: () => view(name) }, title)));
  const last = versions[0].stages.length - 1, packed = versions[0].stages.findLastIndex((s) => s.stage === "packed");
  stageOptions($("stage"), `0 ${packed >= 0 ? packed : last}`);
  stageOptions($("before"), versions.length > 1 ? `0 ${last}` : `0 ${Math.max(0, (packed >= 0 ? packed : last) - 1)}`);
  stageOptions($("after"), versions.length > 1 ? `1 ${versions[1].stages.length - 1}` : `0 ${packed >= 0 ? packed : last}`);
  $("colour").append(...Object.entries(COLOURS).filter(([, c]) => c.of === "sqnr" || versions.some((v) => v.layers.some((l) => l[c.of] !== null)))
    .map(([name, c]) => make("option", { value: name }, c.title)));
  state.colour = $("colour").value;
  cy = cytoscape({ container: $("graph"), style: styles(), minZoom: 0.02, maxZoom: 4, boxSelectionEnabled: false,
    autoungrabify: true });
  cy.on("tap", (event) => {
    state.selected = event.target === cy || event.target.isEdge() ? null : event.target.id();
    detail(state.selected);
  });
  cy.on("dbltap", "node", (event) => event.target.id().startsWith("b:") && toggle(event.target.id()));
  $("stage").onchange = openStage;
  $("colour").onchange = () => { state.colour = $("colour").value; draw(false); };
  $("unfold").onclick = unfold;
  $("fold").onclick = () => { state.open.clear(); draw(); };
  $("fit").onclick = () => cy.fit(undefined, 20);
  const zoom = (factor) => cy.zoom({ level: cy.zoom() * factor, renderedPosition: { x: cy.width() / 2, y: cy.height() / 2 } });
  $("in").onclick = () => zoom(1.3);
  $("out").onclick = () => zoom(1 / 1.3);
  $("search").oninput = search;
  $("search").onkeydown = (event) => {
    if (event.key === "Enter") $("matches").firstChild?.click();
    if (event.key === "Escape") $("matches").hidden = true;
  };
  $("filter").oninput = showLayers;
  for (const id of ["before", "after", "all-lines"]) $(id).onchange = showDiff;
  document.onkeydown = (event) => {
    if (event.key === "/" && !["INPUT", "SELECT"].includes(event.target.tagName)) {
      event.preventDefault();
      view("graph");
      $("search").focus();
    }
  };
  dark.onchange = () => { cy.style(styles()); draw(false); };
  view("graph");
  await openStage();
  // How long it took, from the start of the navigation: read by tests, and printed by whoever asks.
  requestAnimationFrame(() => { document.documentElement.dataset.opened = String(Math.round(performance.now())); });
}

start();
