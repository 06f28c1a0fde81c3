// What is selected, in numbers, curves, ways and surfaces.
function details() {
  const chosen = state.selected;
  items($("selected"), chosen.length ? chosen.map(i => button(`${label(i)} ✕`, () => select(i, false), `${label(i)}: leave out`)) : ["none: select a checkpoint in the picture or in the table below"]);
  const heads = ["number", ...chosen.map(label)];
  const rows = wanted => wanted.filter(name => chosen.some(i => data.points[i].numbers[name]))
    .map(name => [words(name), ...chosen.map(i => data.points[i].numbers[name]?.[3] ?? "–")]);
  fill($("numbers"), heads, rows(data.leading));
  fill($("all-numbers"), ["number", "name", ...chosen.map(label)], data.columns.filter(([name]) => chosen.some(i => data.points[i].numbers[name]))
    .map(([name, said]) => [said, name, ...chosen.map(i => data.points[i].numbers[name]?.[3] ?? "–")]));
  const doubts = chosen.flatMap(i => data.points[i].doubts.map(said => `${label(i)}: ${said}`));
  items($("doubts"), doubts);
  $("notes").hidden = !doubts.length;
  drawCurves();
  listEdges();
  $("list").remake();
}

// --- curves ---
function curveLines() {
  const curve = data.curves[$("curve").value], used = {};
  return (curve?.lines ?? []).filter(line => state.selected.includes(line.point)).map(line => {
    const optimizer = data.points[line.point].optimizer, turn = used[optimizer] = (used[optimizer] ?? -1) + 1;
    return { ...line, name: label(line.point), symbol: symbol(optimizer), look: { color: colour(optimizer), dash: DASHES[turn % DASHES.length], width: 2 } };
  });
}
function drawCurves() {
  const curve = data.curves[$("curve").value];
  if (curve) drawLines("curves", curveLines(), curve.x, curve.y);
  const of = curveLines().map(line => line.name).join("; ");
  $("curves").setAttribute("aria-label", curve ? `${curve.title} of ${of || "none"}; the values stand in the table` : "no curve");
  $("curve-values").remake();
}
function values(table, lines, x) {
  fill(table, ["of", x, "value", "± two standard errors"], lines.flatMap(line => line.x.map((v, k) =>
    [line.name, written(v), written(line.y[k]), line.error && line.error[k] !== null ? written(2 * line.error[k]) : "–"])));
}

// --- ways between two ---
function listEdges() {
  const chosen = new Set(state.selected), of = k => chosen.has(data.edges[k].a) + chosen.has(data.edges[k].b);
  const near = [...data.edges.keys()].filter(of).sort((a, b) => of(b) - of(a)).slice(0, 12);
  const none = data.edges.length ? "none: select a checkpoint that has lines to others" : "no line or path between these checkpoints is measured";
  items($("edges"), near.length ? near.map(k => button(edgeName(k), () => openEdge(k))) : [none]);
}
function edgeLines(k) {
  return data.edges[k].ways.map(way => {
    const [dash, light, bright] = WAYS[way.way] ?? ["dot", "#6b6b6b", "#b5b5b5"];
    return { ...way, name: way.doubt ? `${way.way} (${way.doubt})` : way.way, look: { color: dark.matches ? bright : light, dash, width: 2 } };
  });
}
function openEdge(k, move = true) {
  const edge = data.edges[k];
  state.edge = k;
  $("edge").hidden = false;
  $("edge-title").textContent = `Loss between ${edgeName(k)}`;
  drawLines("profile", edgeLines(k), "share of the way from the first to the second", "train loss");
  fill($("edge-numbers"), ["number", "value"], edge.numbers);
  items($("edge-doubts"), edge.doubts);
  $("edge-values").remake();
  if (!move) return;
  $("edge-title").focus({ preventScroll: true });
  $("edge-title").scrollIntoView({ block: "nearest" });
  $("profile").scrollIntoView({ block: "nearest" });
  say(`Loss between ${edgeName(k)}: ${edge.numbers.map(([name, said]) => `${name} ${said}`).join("; ")}.`);
}

// --- surface ---
function showSurface() {
  const found = data.surfaces[$("surface-of").value], relief = $("surface-as").value === "surface";
  $("surface-shown").hidden = false;
  $("surface-keys").textContent = relief ? `${found.labels.join("; ")}. Drag the relief to turn it, or use the arrow keys.` : "";
  const [low, high] = drawSurface(found, $("surface-as").value), name = `Loss surface of ${label(found.point)}`;
  $("surface").setAttribute("aria-label", name);
  $("surface-values").remake();
  say(`${name}: ${$("surface-as").selectedOptions[0].text}, loss ${written(low)} to ${written(high)}.`);
}
const TURNS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
function turn(event) {  // the eye goes round the relief, or up and down
  const scene = $("surface")._fullLayout?.scene, [round, up] = TURNS[event.key] ?? [0, 0];
  if (!scene || !(round || up)) return;
  event.preventDefault();
  const { x, y, z } = scene._scene.getCamera().eye, far = Math.hypot(x, y, z);
  const angle = Math.atan2(y, x) + .15 * round, height = Math.max(-.1, Math.min(1.5, Math.asin(z / far) + .1 * up));
  const eye = { x: far * Math.cos(height) * Math.cos(angle), y: far * Math.cos(height) * Math.sin(angle), z: far * Math.sin(height) };
  Plotly.relayout("surface", { "scene.camera.eye": eye });
}
function listSurface(table) {
  const found = data.surfaces[$("surface-of").value];
  if (found) fill(table, [found.labels[1], found.labels[0], "loss"], found.y.flatMap((y, j) =>
    found.x.map((x, i) => [written(y), written(x), written(found.grid.loss[j][i])])));
}

// --- long tables ---
function listPoints(table) {
  const box = i => {
    const made = document.createElement("input");
    made.type = "checkbox";
    made.checked = state.selected.includes(i);
    made.setAttribute("aria-label", `select ${label(i)}`);
    made.addEventListener("change", () => select(i, made.checked));
    return made;
  };
  if (table.rows.length) {  // the same rows, so that the keyboard stays where it is
    table.querySelectorAll("input").forEach((made, i) => { made.checked = state.selected.includes(i); });
    return;
  }
  const link = p => { const made = document.createElement("a"); made.href = p.link; made.textContent = p.run.slice(0, 8); made.setAttribute("aria-label", `run ${p.run.slice(0, 8)} in MLflow`); return made; };
  fill(table, ["checkpoint", "select", ...data.leading.map(words), "run"], data.points.map((p, i) =>
    [label(i), box(i), ...data.leading.map(name => text(i, name)), link(p)]));
}
function listAllEdges(table) {
  fill(table, ["between", "profile", "numbers"], data.edges.map((edge, k) =>
    [edgeName(k), button("Show", () => openEdge(k), `Show ${edgeName(k)}`), edge.numbers.map(([name, said]) => `${name}: ${said}`).join("; ")]));
}
