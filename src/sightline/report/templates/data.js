// What the page was given: decoded once.
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
function bytes(base64) {
  const text = atob(base64), out = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
  return out;
}
const D = JSON.parse($("#data").textContent);
const V = D.boxes.length, C = D.channels.length, L = D.layers, H = D.heads, G = D.groups.length;
const PALETTE = bytes(D.palette); // 256 x RGB
for (const run of D.runs) {
  run.rows = bytes(run.rows); // (W + 1, C, V)
  run.scales = new Float32Array(bytes(run.scales).buffer); // (W + 1, C)
  run.masses = bytes(run.masses); // (W + 1, L, H or 1, G)
  run.phi = new Uint16Array(bytes(run.phi).buffer); // (L, V)
  run.massHeads = D.full ? H : 1;
  run.sinkLayers = new Float32Array(V); // share of the layers in which a token is a sink
  for (const columns of run.sinks) for (const t of columns) run.sinkLayers[t] += 1 / L;
}
const SQUARE = Float32Array.from({ length: 256 }, (_, q) => (q / 255) ** 2);
const phiOf = (run, layer, token) => run.phi[layer * V + token] * run.phiStep[layer];
const percent = (x) => (x >= 0.0995 ? (100 * x).toFixed(0) : (100 * x).toFixed(x < 0.00095 ? 2 : 1)) + " %";

// The maps to average for a layer and head (-1: all). Heads that the file does not hold alone give an empty list.
function channelsOf(layer, head) {
  const found = [];
  D.channels.forEach(([first, stop, alone], i) => {
    const rightLayer = layer < 0 || (first <= layer && layer < stop);
    if (rightLayer && (alone === head || (head < 0 && D.full))) found.push(i);
  });
  return found;
}

// Heads that can be seen alone at a layer.
function headsAt(layer) {
  if (D.full) return Array.from({ length: H }, (_, h) => h);
  return D.channels.filter(([first, stop, h]) => h >= 0 && first <= layer && layer < stop).map((c) => c[2]);
}

// (V) attention of a word (-1: the whole answer) on every visual token, mean over the chosen layers and heads.
function attention(run, word, layer, head, hide) {
  const out = new Float32Array(V), w = word < 0 ? run.words.length : word, channels = channelsOf(layer, head);
  for (const c of channels) {
    const at = (w * C + c) * V, scale = run.scales[w * C + c] / channels.length;
    const [first, stop] = D.channels[c];
    if (!hide) { for (let t = 0; t < V; t++) out[t] += scale * SQUARE[run.rows[at + t]]; continue; }
    const hidden = new Uint8Array(V);
    for (let l = first; l < stop; l++) for (const t of run.sinks[l]) hidden[t] = 1;
    for (let t = 0; t < V; t++) if (!hidden[t]) out[t] += scale * SQUARE[run.rows[at + t]];
  }
  return out;
}

// (G) mass per key group.
function masses(run, word, layer, head) {
  const w = word < 0 ? run.words.length : word, n = run.massHeads, out = new Float32Array(G);
  for (let h = 0; h < n; h++) {
    if (n > 1 && head >= 0 && h !== head) continue;
    for (let g = 0; g < G; g++) out[g] += run.masses[((w * L + layer) * n + h) * G + g] / 255;
  }
  const total = out.reduce((a, b) => a + b, 0) || 1;
  return out.map((x) => x / total);
}
