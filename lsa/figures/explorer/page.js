// What is chosen and what is shown; every text goes into the page as text, never as markup.
const $ = id => document.getElementById(id);
const state = { selected: [], focus: -1, epoch: 0, timer: null, edge: -1, busy: false };
let data, trainings, epochs, names;

async function unpacked(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), letter => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

function say(text) { $("status").textContent = text; }
function label(i) {
  const p = data.points[i];
  return `${p.optimizer}, seed ${p.seed}, epoch ${p.epoch}`;
}
function words(name) { return names.get(name) ?? name; }
function text(i, name) { return number(i, name)?.[3] ?? "–"; }
function number(i, name) {  // value, both ends of its interval, as text; undefined without one
  const p = data.points[i];
  if (name === "epoch" || name === "seed") return [p[name], null, null, String(p[name])];
  const found = p.numbers[name];
  return found && found[0] !== null ? found : undefined;
}

// Checkpoints up to the epoch that is played: all of them, or the newest of each training.
function reached() {
  const kept = trainings.map(points => points.filter(i => data.points[i].epoch <= state.epoch));
  return $("all-shown").checked ? kept.flat() : kept.flatMap(points => points.slice(-1));
}
// Both numbers of every checkpoint, and whether it has a place in the picture: kept until an axis changes.
function place() {
  const axis = name => ({ name: $(name).value, log: $(`${name}-log`).checked, at: data.points.map((_, i) => number(i, $(name).value)?.[0]) });
  const x = axis("x"), y = axis("y"), has = (of, i) => of.at[i] !== undefined && (!of.log || of.at[i] > 0);
  state.axes = { x, y, fits: data.points.map((_, i) => has(x, i) && has(y, i)) };
}
function drawable(points) { return points.filter(i => state.axes.fits[i]); }

function select(i, on = !state.selected.includes(i)) {
  state.selected = state.selected.filter(other => other !== i);
  if (on) state.selected.push(i);
  markChosen();
  details();
  say(`${label(i)} ${on ? "selected" : "left out"}; ${state.selected.length} selected.`);
}

// --- tables ---
function cell(line, content, kind = "td") {
  const made = document.createElement(kind);
  if (kind === "th") made.scope = line.parentNode.tagName === "THEAD" ? "col" : "row";
  made.append(content);
  line.append(made);
}
function fill(table, headings, rows) {  // rows of texts or nodes; the first cell names the row
  const head = document.createElement("thead"), body = document.createElement("tbody");
  const top = head.insertRow();
  for (const heading of headings) cell(top, heading, "th");
  for (const row of rows) {
    const line = body.insertRow();
    row.forEach((content, k) => cell(line, content, k ? "td" : "th"));
  }
  table.replaceChildren(...(rows.length ? [head, body] : []));
}
function whenOpened(id, make) {  // a long table is made when somebody opens it, and anew after a change
  const fold = $(id);
  fold.remake = () => { if (fold.open) make(fold.querySelector("table")); };
  fold.addEventListener("toggle", fold.remake);
}
function items(list, texts) {
  list.replaceChildren(...texts.map(said => {
    const item = document.createElement("li");
    item.append(said);
    return item;
  }));
}
function button(said, act, name = said) {  // the name is what a screen reader says
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = said;
  if (name !== said) made.setAttribute("aria-label", name);
  made.addEventListener("click", act);
  return made;
}
function written(value) { return value === null ? "–" : String(Number(value.toPrecision(4))); }
