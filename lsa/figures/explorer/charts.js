// The charts, drawn by Plotly.
const MANY = 200;  // checkpoints from which all is drawn by WebGL, without intervals
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const WAYS = {  // stroke, and colour on light and on dark ground
  "straight line": ["solid", "#6b6b6b", "#b5b5b5"],
  "straight line, units aligned": ["dash", "#882255", "#d98ab5"],
  "minimum-energy path": ["dashdot", "#332288", "#a79df0"],
};
const webgl = Boolean(document.createElement("canvas").getContext("webgl"));
const dark = matchMedia("(prefers-color-scheme: dark)"), coarse = matchMedia("(pointer: coarse)");
const OPTIONS = { responsive: true, displayModeBar: false, scrollZoom: false };

function safe(said) { return String(said).replaceAll("&", "&amp;").replaceAll("<", "&lt;"); }  // Plotly reads a little markup
function style(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
function colour(optimizer) {
  const found = data.colours[data.optimizers.indexOf(optimizer) % data.colours.length];
  return found === "#000000" ? style("--ink") : found;
}
function symbol(optimizer) {  // of one colour, each optimizer has another
  const i = data.optimizers.indexOf(optimizer);
  return data.symbols[(i + Math.floor(i / data.colours.length)) % data.symbols.length];
}

function layout(x, y, more = {}) {
  const axis = (title, extra) => ({ title: { text: safe(title) }, gridcolor: style("--line"), zerolinecolor: style("--line"), automargin: true, exponentformat: "e", ...extra });
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: style("--ink"), size: 13 },
    margin: { l: 20, r: 10, t: 10, b: 20 }, hovermode: "closest", dragmode: coarse.matches ? false : "zoom",
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    hoverlabel: { bgcolor: style("--page"), bordercolor: style("--soft"), font: { color: style("--ink") }, align: "left" },
    ...more, xaxis: axis(x, more.xaxis), yaxis: axis(y, more.yaxis),
  };
}

// --- checkpoints ---
function joined(groups, value) {  // groups of points as lines, with a gap between two
  return groups.flatMap(points => [...points.map(value), null]);
}
function intervals(points, name) {
  const values = points.map(i => number(i, name));
  const off = k => values.map(v => v[k] === null ? 0 : Math.abs(v[k] - v[0]));
  return { type: "data", array: off(2), arrayminus: off(1), symmetric: false, thickness: 1, width: 0,
    visible: $("errors-shown").checked };
}
function pointsTrace(points, type, more) {
  const { x, y } = state.axes;
  return {
    type, mode: "markers", x: points.map(i => x.at[i]), y: points.map(i => y.at[i]),
    customdata: points, hoverinfo: "text", meta: "points",
    hovertext: points.map(i => safe(`${label(i)}\n${words(x.name)}: ${text(i, x.name)}\n${words(y.name)}: ${text(i, y.name)}`).replaceAll("\n", "<br>")),
    ...(type === "scattergl" ? {} : { error_x: intervals(points, x.name), error_y: intervals(points, y.name) }), ...more,
  };
}
function middle(edge, axis) {
  const { at, log } = state.axes[axis], [a, b] = [at[edge.a], at[edge.b]];
  return log ? Math.sqrt(a * b) : (a + b) / 2;
}
function edgeTraces(visible, type) {
  const there = new Set(visible), { x, y } = state.axes;
  const drawn = data.edges.map((edge, k) => k).filter(k => $("edges-shown").checked && there.has(data.edges[k].a) && there.has(data.edges[k].b));
  const path = k => data.edges[k].ways.some(way => way.way === "minimum-energy path");
  return [["straight line", drawn.filter(k => !path(k))], ["minimum-energy path", drawn.filter(path)]].flatMap(([way, ks]) => {
    const look = { color: WAYS[way][dark.matches ? 2 : 1], dash: WAYS[way][0], width: 1.2 };
    const ends = ks.map(k => [data.edges[k].a, data.edges[k].b]);
    const said = way === "straight line" ? "line measured between" : "path searched between";
    return [
      { type, mode: "lines", line: look, hoverinfo: "skip", showlegend: false, opacity: .6,
        x: joined(ends, i => x.at[i]), y: joined(ends, i => y.at[i]) },
      { type, mode: "markers", name: said, showlegend: ks.length > 0, meta: "edges", customdata: ks, hoverinfo: "text",
        marker: { symbol: way === "straight line" ? "diamond-open" : "diamond", size: 9, color: look.color },
        x: ks.map(k => middle(data.edges[k], "x")), y: ks.map(k => middle(data.edges[k], "y")),
        hovertext: ks.map(k => safe(edgeSaid(k)).replaceAll("\n", "<br>")) },
    ];
  });
}
function edgeName(k) { return `${label(data.edges[k].a)} – ${label(data.edges[k].b)}`; }
function edgeSaid(k) { return [edgeName(k), ...data.edges[k].numbers.map(([name, said]) => `${name}: ${said}`)].join("\n"); }
function unread(id) {  // its name and the table beside it say what a chart shows; its shapes have no names
  for (const inner of [...$(id).children, $("js-plotly-tester")]) inner?.setAttribute("aria-hidden", "true");
}
function whole(axis, points) {  // a range that stays while epochs are played
  const { at, log } = state.axes[axis], values = points.map(i => log ? Math.log10(at[i]) : at[i]);
  const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b)), room = .06 * (high - low || 1);
  return { range: [low - room, high + room] };
}
function drawMap() {
  const visible = drawable(reached()), { x, y } = state.axes, type = visible.length > MANY && webgl ? "scattergl" : "scatter";
  const moving = $("all-shown").checked || state.epoch < epochs.at(-1);
  const everything = moving ? drawable([...data.points.keys()]) : [];
  const trails = optimizer => moving ? trainings.filter(points => data.points[points[0]].optimizer === optimizer)
    .map(points => drawable(points.filter(i => data.points[i].epoch <= state.epoch))) : [];
  const traces = data.optimizers.map(name => ({ type, mode: "lines", hoverinfo: "skip", showlegend: false, opacity: .5,
    line: { color: colour(name), width: 1.5 }, x: joined(trails(name), i => x.at[i]), y: joined(trails(name), i => y.at[i]) }));
  traces.push(...edgeTraces(visible, type));
  for (const name of data.optimizers) {
    const own = visible.filter(i => data.points[i].optimizer === name);
    traces.push(pointsTrace(own, type, { name: safe(name), marker: { color: colour(name), symbol: symbol(name), size: 11, line: { color: style("--page"), width: 1 } } }));
  }
  // Without a trace of its kind Plotly gives WebGL up, and takes long to begin it again.
  if (webgl && data.points.length > MANY && type === "scatter") traces.push({ type: "scattergl", x: [null], y: [null], hoverinfo: "skip", showlegend: false });
  // Margins that no label moves: Plotly would draw all twice.
  const axis = name => ({ automargin: false, type: state.axes[name].log ? "log" : "linear", ...(everything.length ? whole(name, everything) : { autorange: true }) });
  const view = [x.name, y.name, moving, x.log, y.log].join(" ");
  Plotly.react("map", traces, layout(words(x.name), words(y.name), { uirevision: view, margin: { l: 76, r: 10, t: 10, b: 52 }, xaxis: axis("x"), yaxis: axis("y") }), OPTIONS);
  unread("map");
  $("map").setAttribute("aria-label", `${visible.length} of ${data.points.length} checkpoints: ${words(y.name)} against ${words(x.name)}`);
  markChosen();
  return visible;
}
// Rings round the selected and round the one that the keyboard is at, laid over the picture: to move one
// draws nothing else again, however many checkpoints there are.
function markChosen() {
  const there = new Set(drawable(reached())), { _size: size, xaxis, yaxis } = $("map")._fullLayout;
  const ring = (i, kind) => {
    const made = document.createElement("span"), { x, y } = state.axes, [left, top] = [xaxis.d2p(x.at[i]), yaxis.d2p(y.at[i])];
    made.className = kind;
    made.style.left = `${size.l + left}px`;
    made.style.top = `${size.t + top}px`;
    made.hidden = left < 0 || top < 0 || left > size.w || top > size.h;
    return made;
  };
  $("rings").replaceChildren(...state.selected.filter(i => there.has(i)).map(i => ring(i, "chosen")), ...[state.focus].filter(i => there.has(i)).map(i => ring(i, "aimed")));
}

// --- lines ---
function band(line, look, log) {  // two standard errors to both sides
  if (!line.error) return [];
  const least = v => log ? v / 1000 : -Infinity;  // a logarithmic axis has no place for 0
  const end = (v, error, sign) => v === null || error === null ? null : Math.max(v + sign * 2 * error, least(v));
  const edge = sign => ({ type: "scatter", mode: "lines", x: line.x, y: line.y.map((v, k) => end(v, line.error[k], sign)),
    line: { width: 0 }, hoverinfo: "skip", showlegend: false });
  return [edge(-1), { ...edge(1), fill: "tonexty", fillcolor: look.color + "33" }];
}
function heights(lines) {  // a logarithmic axis where values span decades
  const values = lines.flatMap(line => line.y).filter(v => v !== null), positive = values.filter(v => v > 0).sort((a, b) => a - b);
  if (!positive.length || values.some(v => v < 0) || positive.at(-1) <= 50 * positive[positive.length >> 1]) return { type: "linear", autorange: true };
  const high = positive.at(-1);
  return { type: "log", range: [Math.log10(Math.max(positive[0], 1e-7 * high) / 2), Math.log10(2 * high)] };
}
function drawLines(id, lines, x, y) {  // [{ x, y, error, name, look }]
  const few = lines.length <= 8, yaxis = heights(lines);
  const traces = lines.flatMap(line => [...(few ? band(line, line.look, yaxis.type === "log") : []),
    { type: "scatter", mode: line.x.length > 12 ? "lines" : "lines+markers", x: line.x, y: line.y, name: safe(line.name),
      line: line.look, marker: { symbol: line.symbol ?? "circle", size: 7 }, hoverlabel: { namelength: -1 } }]);
  Plotly.react(id, traces, layout(x, y, { yaxis, showlegend: true, dragmode: false }), OPTIONS);
  unread(id);
}
function drawSurface(found, kind) {
  const z = found.grid.loss, flat = z.flat().filter(v => v !== null), low = flat.reduce((a, b) => Math.min(a, b)), high = flat.reduce((a, b) => Math.max(a, b));
  const log = low > 0 && high > 20 * low, scale = v => v === null ? null : log ? Math.log10(v) : v;
  const height = log ? "log₁₀ loss" : "loss";
  const own = { type: kind, x: found.x, y: found.y, z: z.map(row => row.map(scale)), colorscale: "Viridis", colorbar: { title: { text: height } }, showscale: kind !== "surface", name: "",
    customdata: z, hovertemplate: "x %{x:.3g}, y %{y:.3g}<br>loss %{customdata:.4g}" };
  const marks = kind === "surface"
    ? { type: "scatter3d", z: found.marks.loss.map(scale) } : { type: "scatter" };
  Object.assign(marks, { mode: "lines+markers", x: found.marks.x, y: found.marks.y, text: found.marks.name.map(safe), hoverinfo: "text", showlegend: false,
    line: { color: "#D55E00", width: 2 }, marker: { color: "#D55E00", size: kind === "surface" ? 4 : 9 } });
  const [x, y] = found.labels;
  const axis = said => ({ title: { text: safe(said.split(",")[0]) } });  // in full below the relief, where there is room
  const scene = { xaxis: axis(x), yaxis: axis(y), zaxis: axis(height) };
  Plotly.purge("surface");
  Plotly.newPlot("surface", [own, marks], layout(x, y, { scene, dragmode: kind === "surface" ? "turntable" : false }), OPTIONS);
  unread("surface");
  return [low, high];
}
