// Hands: keyboard, pointer, play; then the page starts.
function aim(i) {
  state.focus = i;
  markChosen();
  const said = ["x", "y"].map(axis => `${words($(axis).value)} ${text(i, $(axis).value)}`).join(", ");
  say(`${label(i)}: ${said}${state.selected.includes(i) ? ", selected" : ""}.`);
}
const STEPS = { ArrowLeft: ["x", "y", -1], ArrowRight: ["x", "y", 1], ArrowUp: ["y", "x", 1], ArrowDown: ["y", "x", -1] };
function along(first, second) {  // what is shown, in the order of an axis
  const at = (i, axis) => state.axes[axis].at[i];
  return drawable(reached()).sort((a, b) => at(a, first) - at(b, first) || at(a, second) - at(b, second) || a - b);
}
function onKey(event) {
  const [first, second, step] = STEPS[event.key] ?? ["x", "y", 0], visible = along(first, second);
  if (step && visible.length) {
    const place = visible.indexOf(state.focus);
    aim(visible[place < 0 ? 0 : Math.max(0, Math.min(visible.length - 1, place + step))]);
  } else if ((event.key === "Enter" || event.key === " ") && visible.includes(state.focus)) {
    select(state.focus);
  } else if (event.key.toLowerCase() === "e" && state.focus >= 0) {
    const k = data.edges.findIndex(edge => edge.a === state.focus || edge.b === state.focus);
    if (k < 0) say(`No line or path from ${label(state.focus)} is measured.`);
    else { if (!state.selected.includes(state.focus)) select(state.focus); openEdge(k); }
  } else if (event.key === "Escape") {
    state.selected = [];
    markChosen(); details(); say("None selected.");
  } else return;
  event.preventDefault();
}

// --- axes ---
function setAxis(axis) {
  const values = drawableValues($(axis).value);
  $(`${axis}-log`).checked = values.length > 1 && values[0] > 0 && values.at(-1) > 30 * values[0];
}
function drawableValues(name) {
  return data.points.map((_, i) => number(i, name)?.[0]).filter(v => v !== undefined).sort((a, b) => a - b);
}
function change() {
  place();
  const visible = drawMap(), all = reached().length;
  say(`${visible.length} of ${all} checkpoints have both numbers: ${words($("y").value)} against ${words($("x").value)}.`);
}

// --- play ---
function setEpoch(k) {
  $("epoch").value = k;
  state.epoch = epochs[k];
  const said = `epoch ${epochs[k]} of ${epochs.at(-1)}`;
  $("epoch").setAttribute("aria-valuetext", said);
  $("epoch-read").textContent = said;
  drawMap();
}
function play(on) {
  clearInterval(state.timer);
  state.timer = null;
  $("play").textContent = on ? "Pause" : "Play";
  if (!on) return;
  if (Number($("epoch").value) >= epochs.length - 1) setEpoch(0);
  state.timer = setInterval(() => {
    const next = Number($("epoch").value) + 1;
    if (next < epochs.length) setEpoch(next);
    if (next >= epochs.length - 1) { play(false); say(`Played to epoch ${epochs.at(-1)}.`); }
  }, 600);
}

function options() {
  for (const axis of ["x", "y"]) {
    for (const [name, said] of [["epoch", "epoch"], ["seed", "seed"], ...data.columns])
      $(axis).append(new Option(said === name || !name.includes("/") ? said : `${said} (${name})`, name));
    $(axis).addEventListener("change", () => { setAxis(axis); change(); });
    $(`${axis}-log`).addEventListener("change", change);
  }
  const first = ["lanczos/lambda_max", "final/val_accuracy", ...data.leading, "epoch"].filter(name => names.has(name) || name === "epoch");
  $("x").value = first[0];
  $("y").value = first.find(name => name !== first[0]) ?? "epoch";
  data.curves.forEach((curve, k) => $("curve").append(new Option(curve.title, k)));
  data.surfaces.forEach((found, k) => $("surface-of").append(new Option(`${label(found.point)} (${found.plane})`, k)));
  $("surface-part").hidden = !data.surfaces.length;
}
function listen() {
  for (const id of ["errors-shown", "edges-shown", "all-shown"]) $(id).addEventListener("change", change);
  $("whole").addEventListener("click", () => Plotly.relayout("map", { "xaxis.autorange": true, "yaxis.autorange": true }));
  $("map").addEventListener("keydown", onKey);
  $("map").addEventListener("focus", () => { if (state.focus < 0 && along("x", "y").length) aim(along("x", "y")[0]); });
  $("map").on("plotly_relayout", markChosen);
  let before = -Infinity;
  $("map").on("plotly_click", event => {
    if (coarse.matches && performance.now() - before < 500) return;  // a tap that the browser tells as a mouse, too
    before = performance.now();
    const hit = event.points.find(point => point.data.meta);
    if (hit?.data.meta === "edges") openEdge(hit.customdata);
    else if (hit) { state.focus = hit.customdata; select(hit.customdata); }
  });
  $("curve").addEventListener("change", drawCurves);
  $("surface-show").addEventListener("click", showSurface);
  $("surface").addEventListener("keydown", turn);
  $("epoch").addEventListener("input", () => { play(false); setEpoch(Number($("epoch").value)); });
  $("play").addEventListener("click", () => play(!state.timer));
  for (const form of document.forms) form.addEventListener("submit", event => event.preventDefault());
  dark.addEventListener("change", () => { drawMap(); drawCurves(); if (state.edge >= 0) openEdge(state.edge, false); if (!$("surface-shown").hidden) showSurface(); });
}
async function start() {
  const library = unpacked("library");
  data = JSON.parse(await unpacked("data"));
  names = new Map(data.columns);
  const by = new Map();
  data.points.forEach((p, i) => by.set(p.run, [...(by.get(p.run) ?? []), i]));
  trainings = [...by.values()];
  epochs = [...new Set(data.points.map(p => p.epoch))].sort((a, b) => a - b);
  $("about").textContent = data.about;
  $("errors").textContent = data.errors;
  options();
  whenOpened("list", listPoints);
  whenOpened("edge-list", listAllEdges);
  whenOpened("curve-values", table => values(table, curveLines(), data.curves[$("curve").value]?.x ?? "x"));
  whenOpened("surface-values", listSurface);
  whenOpened("edge-values", table => values(table, edgeLines(state.edge), "share of the way"));
  const script = document.createElement("script");
  script.textContent = await library;
  document.head.append(script);
  $("player").hidden = epochs.length < 2;
  $("epoch").max = epochs.length - 1;
  for (const axis of ["x", "y"]) setAxis(axis);
  place();
  setEpoch(epochs.length - 1);
  listen();
  const seed = data.points.find(p => p.last)?.seed;
  state.selected = [...data.points.keys()].filter(i => data.points[i].last && data.points[i].seed === seed).slice(0, 4);
  details();
  change();
  document.documentElement.dataset.ready = "yes";
}
start().catch(error => { say(`The page could not start: ${error.message}. A browser of 2023 or later is needed.`); throw error; });
