// State, controls, keys.
const state = { run: 0, word: -1, layer: -1, head: -1, opacity: 0.75, hide: false, marks: true, scale: "rank", crop: -1 };
const panels = $$(".panel").map((root, i) => ({
  root, run: D.runs[i], words: $$(".word", root), stage: $(".stage", root), heat: $(".heat", root), marks: $(".marks", root),
  readout: $(".readout", root), caption: $("figcaption", root), bars: $(".bars", root), hover: -1, values: null,
}));
const headBoxes = $$(".headbox").map((root, i) => ({ canvas: $(".headmap", root), run: D.runs[i], cell: null }));
const headTop = Math.max(0.05, ...D.runs.flatMap((run) => run.headMass));
const wordTop = Math.max(1e-6, ...D.runs.flatMap((run) => run.imageMass));
const clamp = (x, low, high) => Math.max(low, Math.min(high, x));

// The word a panel shows: -1 the whole answer, null when the other answer's word has no counterpart here.
function wordOf(index) {
  if (state.word < 0 || index === state.run) return state.word;
  const twin = D.runs[state.run].twin[state.word];
  return twin < 0 || twin === undefined ? null : twin;
}

const layerName = (l) => (l < 0 ? `all ${L}, mean` : `${l}`);
const headName = (h) => (h < 0 ? `all ${H}, mean` : `${h}`);

function sayWord(panel, word) {
  if (!panel.run.words.length) return "";
  if (word === null) return "no counterpart in this answer";
  return word < 0 ? "whole answer" : `“${panel.run.words[word]}” · probability ${panel.run.probability[word].toFixed(2)}`;
}

function describe(panel, word) {
  const t = panel.hover;
  if (t < 0 || word === null || !panel.values) return sayWord(panel, word);
  const total = panel.values.reduce((a, b) => a + b, 0), value = panel.values[t];
  const layers = state.layer < 0 ? Array.from({ length: L }, (_, l) => l) : [state.layer];
  const phi = Math.max(...layers.map((l) => phiOf(panel.run, l, t)));
  const sink = state.layer < 0 ? panel.run.sinkLayers[t] > 0 : panel.run.sinks[state.layer].includes(t);
  const where = D.crops > 1 ? `crop ${D.crop[t]}, ` : "";
  return `${percent(total > 0 ? value / total : 0)} of the attention on the picture, ${percent(value)} of all · token ${t} (${where}row ${D.cell[t][0]}, column ${D.cell[t][1]})`
    + ` · φ\u00a0${phi.toFixed(1)}${state.layer < 0 ? " at most" : ""}${sink ? ", a sink" : ""}`;
}

function reveal(button) { // long answers scroll inside their box; the page itself stays
  const box = button.parentElement, top = button.offsetTop, bottom = top + button.offsetHeight;
  if (top < box.scrollTop) box.scrollTop = top - 8;
  else if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight + 8;
}

function render() {
  panels.forEach((panel, i) => {
    const word = wordOf(i), pieces = cutOf(state.crop);
    panel.values = word === null || !panel.run.words.length ? new Float32Array(V) : attention(panel.run, word, state.layer, state.head, state.hide);
    drawHeat(panel.heat, pieces, heatOf(pieces, panel.values, state.scale), state.opacity);
    drawMarks(panel.marks, panel.run, state, panel.hover);
    panel.root.classList.toggle("active", i === state.run && panels.length > 1);
    panel.root.classList.toggle("absent", word === null);
    panel.words.forEach((button, w) => {
      button.setAttribute("aria-pressed", String(w === word));
      button.tabIndex = w === Math.max(0, word ?? 0) ? 0 : -1;
    });
    if (word !== null && word >= 0 && panel.shown !== word) reveal(panel.words[word]);
    panel.shown = word;
    panel.readout.textContent = describe(panel, word);
    panel.caption.textContent = panel.run.words.length ? `Attention by layer · ${word === null ? "no counterpart" : word < 0 ? "whole answer" : `“${panel.run.words[word]}”`}${D.full && state.head >= 0 ? ` · head ${state.head}` : ""}` : "";
    if (panel.run.words.length && word !== null) drawBars(panel.bars, panel.run, state, word, (l) => set({ layer: l === state.layer ? -1 : l }));
  });
  for (const box of headBoxes) box.cell = drawHeads(box.canvas, box.run, state, headTop);
  $(".all").setAttribute("aria-pressed", String(state.word < 0));
  const heads = headsAt(state.layer), head = $("#head"), layer = $("#layer");
  layer.max = L - 1; layer.value = state.layer;
  head.max = heads.length - 1; head.disabled = !heads.length; head.value = state.head < 0 ? -1 : heads.indexOf(state.head);
  const spoken = { "layer-name": layerName(state.layer), "head-name": headName(state.head), "opacity-name": `${Math.round(100 * state.opacity)} %` };
  for (const id in spoken) $("#" + id).textContent = spoken[id];
  layer.setAttribute("aria-valuetext", layerName(state.layer));
  head.setAttribute("aria-valuetext", headName(state.head));
  $("#hide").checked = state.hide; $("#marks").checked = state.marks; $("#scale").value = state.scale;
  $("#opacity").value = 100 * state.opacity;
  if ($("#crop")) $("#crop").value = state.crop;
  remember();
}

let waiting = false;
function set(change) {
  Object.assign(state, change);
  state.run = clamp(state.run, 0, D.runs.length - 1);
  state.word = clamp(state.word, -1, D.runs[state.run].words.length - 1);
  state.layer = clamp(state.layer, -1, L - 1);
  state.crop = clamp(state.crop, -1, D.crops - 1);
  if (!headsAt(state.layer).includes(state.head)) state.head = -1;
  if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; render(); }); }
}

// The address keeps the state: report.html#word=2&layer=3
const START = { ...state };
function remember() {
  const parts = Object.keys(START).filter((k) => state[k] !== START[k]).map((k) => `${k}=${Number(state[k]) === state[k] ? +state[k].toFixed(2) : encodeURIComponent(state[k])}`);
  const hash = parts.length ? "#" + parts.join("&") : "";
  if (hash !== location.hash) history.replaceState(null, "", hash || location.pathname + location.search);
}
function recall() {
  const wanted = new URLSearchParams(location.hash.slice(1)), change = { ...START };
  for (const [key, value] of wanted) {
    if (!(key in START)) continue;
    if (typeof START[key] === "boolean") change[key] = value === "true" || value === "1";
    else if (key === "scale") change.scale = value === "share" ? "share" : "rank";
    else if (key === "opacity") change.opacity = clamp(Number(value) || 0, 0, 1);
    else if (Number.isInteger(Number(value))) change[key] = Number(value);
  }
  set(change);
}

function moveWord(step) {
  const n = D.runs[state.run].words.length;
  if (!n) return;
  set({ word: state.word < 0 ? (step > 0 ? 0 : n - 1) : (state.word + step + n) % n });
  if (document.activeElement?.classList.contains("word")) panels[state.run].words[state.word].focus({ preventScroll: true });
}
function moveHead(step) {
  const heads = [-1, ...headsAt(state.layer)];
  set({ head: heads[clamp(heads.indexOf(state.head) + step, 0, heads.length - 1)] });
}

const KEYS = {
  ArrowRight: () => moveWord(panels[state.run].root.querySelector(".answer").dir === "rtl" ? -1 : 1),
  ArrowLeft: () => moveWord(panels[state.run].root.querySelector(".answer").dir === "rtl" ? 1 : -1),
  ArrowUp: () => set({ layer: state.layer + 1 }), ArrowDown: () => set({ layer: state.layer - 1 }),
  "[": () => moveHead(-1), "]": () => moveHead(1),
  a: () => set({ word: -1, layer: -1, head: -1 }), s: () => set({ hide: !state.hide }),
  "?": () => $("#help").showModal(),
};
document.addEventListener("keydown", (event) => {
  const control = event.target.closest("input, select, summary, dialog"), arrow = event.key.startsWith("Arrow");
  if (event.ctrlKey || event.metaKey || event.altKey || $("#help").open || !(event.key in KEYS)) return;
  if (control && (arrow || control.tagName === "SELECT")) return;
  event.preventDefault();
  KEYS[event.key]();
});

panels.forEach((panel, i) => {
  panel.stage.style.maxWidth = `calc(66vh * ${D.size[0] / D.size[1]})`; // tall pictures stay on the screen
  panel.words.forEach((button, w) => {
    button.addEventListener("click", () => set(state.run === i && state.word === w ? { word: -1 } : { run: i, word: w }));
    button.addEventListener("focus", () => { if (state.run !== i && state.word >= 0 && wordOf(i) === w) set({ run: i, word: w }); else if (state.word < 0) set({ run: i }); });
    button.style.setProperty("--mass", panel.run.imageMass[w] / wordTop);
  });
  const point = (event) => {
    const box = panel.stage.getBoundingClientRect();
    const t = tokenAt(((event.clientX - box.left) / box.width) * D.size[0], ((event.clientY - box.top) / box.height) * D.size[1], state.crop);
    hover(t);
  };
  panel.stage.addEventListener("pointermove", point);
  panel.stage.addEventListener("pointerdown", point);
  panel.stage.addEventListener("pointerleave", () => hover(-1));
});
function hover(t) {
  panels.forEach((panel, i) => {
    if (panel.hover === t) return;
    panel.hover = t;
    drawMarks(panel.marks, panel.run, state, t);
    panel.readout.textContent = describe(panel, wordOf(i));
  });
}

for (const box of headBoxes) {
  const cellAt = (event) => {
    const at = box.canvas.getBoundingClientRect(), h = Math.floor((event.clientX - at.left - 26) / box.cell.size), l = Math.floor((event.clientY - at.top) / box.cell.rowTall);
    return l >= 0 && l < L && h >= 0 && h < H ? [l, h] : null;
  };
  box.canvas.addEventListener("click", (event) => { const cell = cellAt(event); if (cell) set({ layer: cell[0], head: cell[1] }); });
  box.canvas.addEventListener("pointermove", (event) => {
    const cell = cellAt(event), i = cell && cell[0] * H + cell[1];
    box.canvas.title = cell ? `layer ${cell[0]}, head ${cell[1]}: ${percent(box.run.headMass[i])} on the picture, ${percent(box.run.headSink[i])} of that on sinks${headsAt(cell[0]).includes(cell[1]) ? "" : " (not alone in this file)"}` : "";
  });
}
for (const button of $$(".pick")) button.addEventListener("click", () => set({ layer: Number(button.dataset.layer), head: Number(button.dataset.head) }));
$(".all").addEventListener("click", () => set({ word: -1 }));
$("#layer").addEventListener("input", (e) => set({ layer: Number(e.target.value) }));
$("#head").addEventListener("input", (e) => set({ head: [-1, ...headsAt(state.layer)][Number(e.target.value) + 1] }));
$("#opacity").addEventListener("input", (e) => set({ opacity: Number(e.target.value) / 100 }));
$("#hide").addEventListener("change", (e) => set({ hide: e.target.checked }));
$("#marks").addEventListener("change", (e) => set({ marks: e.target.checked }));
$("#scale").addEventListener("change", (e) => set({ scale: e.target.value }));
$("#crop")?.addEventListener("change", (e) => set({ crop: Number(e.target.value) }));
$("#help-open").addEventListener("click", () => $("#help").showModal());
window.addEventListener("resize", () => set({}));
window.addEventListener("hashchange", recall);
window.addEventListener("beforeprint", () => $$("details").forEach((part) => { part.dataset.was = part.open; part.open = true; }));
window.addEventListener("afterprint", () => $$("details").forEach((part) => { part.open = part.dataset.was === "true"; }));

D.groups.forEach((name) => {
  const item = document.createElement("li"), chip = document.createElement("i");
  chip.style.background = colourOf(name);
  item.append(chip, name);
  $(".groups").append(item);
});
const ramp = $("#ramp").getContext("2d");
for (let x = 0; x < 96; x++) {
  const k = 3 * Math.round((255 * x) / 95);
  ramp.fillStyle = `rgb(${PALETTE[k]},${PALETTE[k + 1]},${PALETTE[k + 2]})`;
  ramp.fillRect(x, 0, 1, 8);
}
document.documentElement.classList.add("ready");
recall();
