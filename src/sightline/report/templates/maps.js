// The picture cut into regions: pixels of a coarse raster that the same visual tokens cover.
const RASTER = (() => {
  const k = Math.min(1, 448 / Math.max(...D.size));
  const grow = Math.max(1, Math.ceil(224 / Math.max(...D.size)));
  return { w: Math.max(1, Math.round(D.size[0] * k * grow)), h: Math.max(1, Math.round(D.size[1] * k * grow)) };
})();

// Cut for the given crops: region of every raster pixel, and per region its tokens and area.
function cut(crops) {
  const { w, h } = RASTER, sx = w / D.size[0], sy = h / D.size[1];
  let region = new Int32Array(w * h);
  let tokens = [[]];
  for (const crop of crops) {
    const cover = new Int32Array(w * h).fill(-1);
    D.boxes.forEach((box, t) => {
      if (!box || D.crop[t] !== crop) return;
      const x0 = Math.max(0, Math.round(box[0] * sx)), x1 = Math.min(w, Math.round(box[2] * sx));
      const y0 = Math.max(0, Math.round(box[1] * sy)), y1 = Math.min(h, Math.round(box[3] * sy));
      for (let y = y0; y < y1; y++) cover.fill(t, y * w + x0, Math.max(y * w + x0, y * w + x1));
    });
    const known = new Map(), next = new Int32Array(w * h), lists = [];
    for (let p = 0; p < w * h; p++) {
      const key = region[p] * (V + 1) + cover[p] + 1;
      let id = known.get(key);
      if (id === undefined) {
        id = lists.length;
        known.set(key, id);
        lists.push(cover[p] < 0 ? tokens[region[p]] : [...tokens[region[p]], cover[p]]);
      }
      next[p] = id;
    }
    region = next;
    tokens = lists;
  }
  const area = new Float32Array(tokens.length);
  for (const id of region) area[id] += 1;
  return { region, tokens, area };
}
const cuts = new Map();
function cutOf(crop) {
  if (!cuts.has(crop)) cuts.set(crop, cut(crop < 0 ? Array.from({ length: D.crops }, (_, c) => c) : [crop]));
  return cuts.get(crop);
}

const tokenArea = D.boxes.map((b) => (b ? Math.max(1e-6, (b[2] - b[0]) * (b[3] - b[1])) : Infinity));

// Heat in 0..1 per region, by rank (weighted by area; nothing stays 0) or by share of the largest. Where crops overlap
// it is the mean of their tokens, weighted by tokens per pixel.
function heatOf(pieces, values, scale) {
  const n = pieces.tokens.length, raw = new Float64Array(n), heat = new Float32Array(n);
  for (let i = 0; i < n; i++) {
    let weight = 0;
    for (const t of pieces.tokens[i]) { raw[i] += values[t] / tokenArea[t]; weight += 1 / tokenArea[t]; }
    if (weight > 0) raw[i] /= weight;
  }
  if (scale === "share") {
    const top = raw.reduce((a, b) => Math.max(a, b), 0) || 1;
    return heat.map((_, i) => raw[i] / top);
  }
  const order = [...raw.keys()].filter((i) => raw[i] > 0).sort((a, b) => raw[a] - raw[b]);
  const total = order.reduce((sum, i) => sum + pieces.area[i], 0) || 1;
  let below = 0;
  for (let start = 0; start < order.length; ) {
    let stop = start, weight = 0;
    while (stop < order.length && raw[order[stop]] === raw[order[start]]) weight += pieces.area[order[stop++]];
    for (let i = start; i < stop; i++) heat[order[i]] = (below + weight / 2) / total;
    below += weight;
    start = stop;
  }
  return heat;
}

// The smallest token box under a point of the picture, or -1.
function tokenAt(x, y, crop) {
  let best = -1;
  D.boxes.forEach((b, t) => {
    if (!b || (crop >= 0 && D.crop[t] !== crop) || x < b[0] || x >= b[2] || y < b[1] || y >= b[3]) return;
    if (best < 0 || tokenArea[t] < tokenArea[best]) best = t;
  });
  return best;
}
