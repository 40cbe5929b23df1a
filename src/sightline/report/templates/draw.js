// Drawing: heat and marks over the picture, bars per layer, the map of heads.
function colourOf(name) { // picture warm, its sinks darker, the rest cool and grey
  if (/sink/.test(name) && /visual|image/.test(name)) return "#d55e00";
  if (/image|visual/.test(name)) return "#e69f00";
  const rest = ["#9aa3ad", "#56b4e9", "#0072b2", "#009e73", "#cc79a7", "#f0e442"];
  const cold = D.groups.filter((g) => !/image|visual/.test(g));
  return rest[cold.indexOf(name) % rest.length];
}

function drawHeat(canvas, pieces, heat, opacity) {
  const { w, h } = RASTER;
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  const context = canvas.getContext("2d"), image = context.createImageData(w, h), out = new Uint32Array(image.data.buffer);
  const colour = new Uint32Array(heat.length);
  for (let i = 0; i < heat.length; i++) {
    const k = 3 * Math.round(255 * Math.min(1, heat[i]));
    const alpha = Math.round(255 * opacity * heat[i] ** 1.3);
    colour[i] = heat[i] > 0 ? ((alpha << 24) | (PALETTE[k + 2] << 16) | (PALETTE[k + 1] << 8) | PALETTE[k]) >>> 0 : 0;
  }
  for (let p = 0; p < out.length; p++) out[p] = colour[pieces.region[p]];
  context.putImageData(image, 0, 0);
}

function drawMarks(canvas, run, state, hover) {
  const box = canvas.getBoundingClientRect(), dpr = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(box.width * dpr));
  canvas.height = Math.max(1, Math.round(box.height * dpr));
  const g = canvas.getContext("2d"), sx = canvas.width / D.size[0], sy = canvas.height / D.size[1];
  const outline = (t, alpha, inner) => {
    const b = D.boxes[t];
    if (!b || (state.crop >= 0 && D.crop[t] !== state.crop)) return;
    const x = b[0] * sx, y = b[1] * sy, w = (b[2] - b[0]) * sx, h = (b[3] - b[1]) * sy, d = dpr;
    g.globalAlpha = alpha;
    g.lineWidth = 3.5 * d; g.strokeStyle = "#000"; g.strokeRect(x + d, y + d, w - 2 * d, h - 2 * d);
    g.lineWidth = 1.75 * d; g.strokeStyle = inner; g.strokeRect(x + d, y + d, w - 2 * d, h - 2 * d);
  };
  if (state.marks) {
    if (state.layer >= 0) for (const t of run.sinks[state.layer]) outline(t, 1, "#5ff2ff");
    else run.sinkLayers.forEach((share, t) => { if (share > 0) outline(t, 0.35 + 0.65 * share, "#5ff2ff"); });
  }
  if (hover >= 0) outline(hover, 1, "#fff");
}

const SVG = "http://www.w3.org/2000/svg";
function svg(name, attributes, parent, text) {
  const node = document.createElementNS(SVG, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

// Stacked bars: where the attention of the chosen word goes, layer by layer.
function drawBars(holder, run, state, word, pick) {
  const width = Math.max(200, holder.clientWidth), height = 124, left = 36, bottom = 18, top = 6, step = (width - left) / L, tall = height - bottom - top;
  let root = holder.firstChild;
  if (!root || root.viewBox.baseVal.width !== width) { // first time, or the window has changed
    root?.remove();
    root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" }, holder);
    for (const share of [0, 0.5, 1]) {
      const y = top + tall * (1 - share);
      svg("line", { x1: left, x2: width, y1: y, y2: y, class: "grid" }, root);
      svg("text", { x: left - 5, y: y + 3.5, "text-anchor": "end" }, root, `${100 * share}%`);
    }
    const every = Math.ceil(22 / step);
    for (let l = 0; l < L; l++) {
      const bar = svg("g", { class: "bar", "data-layer": l }, root);
      for (let g = 0; g < G; g++)
        svg("rect", { x: left + l * step + step * 0.12, width: step * 0.76, fill: colourOf(D.groups[g]) }, bar);
      svg("rect", { x: left + l * step, width: step, y: 0, height, fill: "transparent" }, bar).addEventListener("click", () => pick(l));
      svg("title", {}, bar);
      if (l % every === 0) svg("text", { x: left + (l + 0.5) * step, y: height - 4, "text-anchor": "middle" }, bar, String(l));
    }
  }
  const spoken = [];
  for (const bar of $$("g.bar", root)) {
    const l = Number(bar.dataset.layer), mass = masses(run, word, l, state.head), parts = $$("rect", bar);
    let y = top + tall;
    mass.forEach((share, g) => {
      y -= tall * share;
      parts[g].setAttribute("y", y);
      parts[g].setAttribute("height", tall * share);
    });
    bar.classList.toggle("faded", state.layer >= 0 && state.layer !== l);
    $("title", bar).textContent = `layer ${l}\n` + D.groups.map((name, g) => `${name} ${percent(mass[g])}`).join("\n");
    if (state.layer === l || state.layer < 0) spoken.push(mass);
  }
  const mean = (g) => spoken.reduce((sum, mass) => sum + mass[g], 0) / spoken.length;
  root.setAttribute("aria-label", "Attention by group: " + D.groups.map((name, g) => `${name} ${percent(mean(g))}`).join(", "));
}

// L x H map of the mass on the picture; returns the size of a cell, by which a click finds its head.
function drawHeads(canvas, run, state, top) {
  const dpr = window.devicePixelRatio || 1, wide = canvas.clientWidth || 300;
  const size = Math.max(3, Math.min(44, Math.floor((wide - 26) / H)));
  const rowTall = Math.max(Math.min(size, 20), 5), tall = rowTall * L + 18;
  canvas.style.height = tall + "px";
  canvas.width = wide * dpr;
  canvas.height = tall * dpr;
  const g = canvas.getContext("2d"), ink = getComputedStyle(canvas).color;
  g.scale(dpr, dpr);
  g.font = "10px system-ui, sans-serif";
  for (let l = 0; l < L; l++) for (let h = 0; h < H; h++) {
    const i = l * H + h, k = 3 * Math.round(255 * Math.min(1, run.headMass[i] / top)), x = 26 + h * size, y = l * rowTall;
    g.fillStyle = `rgb(${PALETTE[k]},${PALETTE[k + 1]},${PALETTE[k + 2]})`;
    g.fillRect(x, y, size - 1, rowTall - 1);
    if (run.headCentric[i] && rowTall > 5) {
      g.fillStyle = run.headMass[i] / top > 0.6 ? "#000" : "#fff";
      g.beginPath(); g.arc(x + (size - 1) / 2, y + (rowTall - 1) / 2, Math.min(2.2, size / 5), 0, 7); g.fill();
    }
  }
  if (state.layer >= 0 || state.head >= 0) { // frame the chosen row, column or head
    const x = 26 + Math.max(0, state.head) * size, y = Math.max(0, state.layer) * rowTall;
    g.strokeStyle = "#5ff2ff"; g.lineWidth = 2;
    g.strokeRect(x, y, state.head < 0 ? H * size - 1 : size - 1, state.layer < 0 ? L * rowTall - 1 : rowTall - 1);
  }
  g.fillStyle = ink;
  g.textAlign = "right";
  const every = Math.ceil(13 / rowTall);
  for (let l = 0; l < L; l += every) g.fillText(l, 20, l * rowTall + rowTall / 2 + 3);
  g.textAlign = "center";
  const along = Math.ceil(20 / size);
  for (let h = 0; h < H; h += along) g.fillText(h, 26 + h * size + size / 2, tall - 5);
  return { size, rowTall };
}
