/* What is drawn. Every function draws one canvas from what it is given. */

const colours = data.colours.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));

/** The colour of a cosine, [r, g, b]: dark at 0 and below, bright at 1. */
function shade(value) {
  return colours[Math.max(0, Math.min(colours.length - 1, Math.round(value * (colours.length - 1))))];
}

function css([r, g, b], alpha = 1) {
  return `rgba(${r}, ${g}, ${b}, ${alpha})`;
}

/** The colour of a token by its place in the text, while none is chosen. */
function shadeOfPlace(i) {
  return shade(0.06 + (0.86 * i) / Math.max(1, nTokens - 1));
}

/** A canvas's context in CSS pixels, cleared; its width and height. */
function prepare(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = `${width < 240 ? 10 : 12}px system-ui, sans-serif`;
  return { context, width, height };
}

/** The colours of the style sheet, which depend on the reader's preference for light or dark. */
function readTheme() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(["ink", "soft", "line", "sphere", "ring", "panel"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}
let look = readTheme();

/* --- the sphere, or the plane ------------------------------------------------------------ */

/** From a place to the screen: x and y in pixels, and z towards the viewer. */
function camera(width, height, view) {
  const radius = Math.min(width, height) * (onSphere ? 0.44 : 0.46);
  const [cy, sy, ct, st] = [Math.cos(view.yaw), Math.sin(view.yaw), Math.cos(view.tilt), Math.sin(view.tilt)];
  const project = (x, y, z) => {
    if (!onSphere) return [width / 2 + radius * x, height / 2 - radius * y, 0];
    const turned = x * sy + z * cy;
    return [
      width / 2 + radius * (x * cy - z * sy),
      height / 2 - radius * (y * ct - turned * st),
      y * st + turned * ct,
    ];
  };
  project.radius = radius;
  return project;
}

function path(context, points) {
  context.beginPath();
  points.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
}

/** A circle of latitude, `polar` away from the pole. */
function circle(project, polar) {
  const [r, y] = [Math.sin(polar), Math.cos(polar)];
  return Array.from({ length: 73 }, (_, i) => project(r * Math.cos((i * Math.PI) / 36), y, r * Math.sin((i * Math.PI) / 36)));
}

/** The convex hull of points (Andrew's monotone chain). */
function hull(points) {
  const sorted = [...points].sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  const half = (list) => {
    const out = [];
    for (const p of list) {
      while (out.length > 1) {
        const [a, b] = out.slice(-2);
        if ((b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]) > 0) break;
        out.pop();
      }
      out.push(p);
    }
    return out.slice(0, -1);
  };
  return [...half(sorted), ...half(sorted.reverse())];
}

function drawGlobe(context, project, places) {
  const centre = project(0, 0, 0);
  const size = project.radius;
  const light = context.createRadialGradient(centre[0] - size / 3, centre[1] - size / 3, size / 10, centre[0], centre[1], size);
  light.addColorStop(0, look.panel);
  light.addColorStop(1, look.sphere);
  context.fillStyle = light;
  context.beginPath();
  context.arc(centre[0], centre[1], size, 0, 2 * Math.PI);
  context.fill();
  context.strokeStyle = look.line;
  context.lineWidth = 1;
  context.stroke();
  for (const degrees of [30, 60, 90]) {
    const ring = circle(project, (degrees * Math.PI) / 180);
    for (let i = 1; i < ring.length; i++) {
      context.globalAlpha = ring[i][2] < 0 ? 0.35 : 1;
      path(context, [ring[i - 1], ring[i]]);
      context.stroke();
    }
    context.globalAlpha = 1;
    const right = ring.reduce((best, p) => (p[0] > best[0] ? p : best));
    context.fillStyle = look.soft;
    context.textAlign = "right";
    if (degrees > 30) context.fillText(`${degrees}°`, right[0] - 4, right[1] - 3);
  }
  let height = 0;
  for (let i = 0; i < nTokens; i++) height += places[3 * i + 1] / nTokens;
  const rim = circle(project, Math.acos(Math.max(-1, Math.min(1, height))));
  context.fillStyle = look.soft;
  context.globalAlpha = 0.16;
  path(context, hull([...rim, centre]));
  context.fill();
  context.globalAlpha = 0.9;
  context.strokeStyle = look.soft;
  context.lineWidth = 1.5;
  path(context, rim);
  context.stroke();
  path(context, [centre, project(0, 1, 0)]);
  context.stroke();
  context.globalAlpha = 1;
}

function drawPlane(context, project) {
  context.strokeStyle = look.line;
  context.lineWidth = 1;
  if (data.projection !== "pca") return;
  path(context, Array.from({ length: 73 }, (_, i) => project(Math.cos((i * Math.PI) / 36), Math.sin((i * Math.PI) / 36), 0)));
  context.stroke();
  path(context, [project(-0.04, 0, 0), project(0.04, 0, 0)]);
  context.stroke();
  path(context, [project(0, -0.04, 0), project(0, 0.04, 0)]);
  context.stroke();
}

/**
 * Draw the tokens; returns their places on the canvas, [x, y, depth] by token, to find what is pointed at.
 * `pairs` are the cosines of the step, null while they are decoded; `token` is the one chosen, or -1.
 */
function drawSpace(canvas, places, pairs, token, view) {
  const { context, width, height } = prepare(canvas);
  const project = camera(width, height, view);
  if (onSphere) drawGlobe(context, project, places);
  else drawPlane(context, project);
  const centre = project(0, 0, 0);
  const points = Array.from({ length: nTokens }, (_, i) => project(places[3 * i], places[3 * i + 1], places[3 * i + 2]));
  const base = Math.max(2.2, width / 115);
  const order = points.map((_, i) => i).sort((a, b) => points[a][2] - points[b][2]);
  const lit = token >= 0 && pairs;
  if (lit) order.sort((a, b) => cosine(pairs, token, a) - cosine(pairs, token, b));
  for (const i of order) {
    const [x, y, depth] = points[i];
    const value = lit ? cosine(pairs, token, i) : 0;
    const colour = lit ? shade(value) : shadeOfPlace(i);
    const near = onSphere ? 0.5 + 0.5 * ((depth + 1) / 2) : 1;
    if (onSphere) {
      context.strokeStyle = css(colour, lit ? 0.05 + 0.5 * Math.max(0, value) : 0.14);
      context.lineWidth = 1;
      path(context, [centre, points[i]]);
      context.stroke();
    }
    context.globalAlpha = lit ? 1 : near;
    context.fillStyle = css(colour);
    context.strokeStyle = look.panel;
    context.lineWidth = 0.8;
    context.beginPath();
    context.arc(x, y, base * (lit ? 0.75 + 0.7 * Math.max(0, value) : 0.6 + 0.6 * near), 0, 2 * Math.PI);
    context.fill();
    context.stroke();
    context.globalAlpha = 1;
  }
  if (token >= 0) drawChosen(context, points, pairs, token, base, width);
  return points;
}

function drawChosen(context, points, pairs, token, base, width) {
  const [x, y] = points[token];
  context.strokeStyle = look.ring;
  context.lineWidth = 2.5;
  context.beginPath();
  context.arc(x, y, base * 2.1, 0, 2 * Math.PI);
  context.stroke();
  const text = visible(data.tokens[token]);
  context.font = `600 ${width < 240 ? 11 : 14}px system-ui, sans-serif`;
  const room = context.measureText(text).width;
  const left = x + base * 3 + room > width ? x - base * 3 - room : x + base * 3;
  context.textAlign = "left";
  context.lineWidth = 4;
  context.strokeStyle = look.panel;
  context.strokeText(text, left, y + 4);
  context.fillStyle = look.ink;
  context.fillText(text, left, y + 4);
}

/* --- the matrix and its histogram ---------------------------------------------------------- */

const scratch = document.createElement("canvas");

/** Draw the cosine of every pair; a chosen token's row and column are framed. */
function drawMatrix(canvas, pairs, token) {
  const { context, width, height } = prepare(canvas);
  scratch.width = scratch.height = nTokens;
  const pen = scratch.getContext("2d");
  const image = pen.createImageData(nTokens, nTokens);
  const pixels = new Uint32Array(image.data.buffer);
  const palette = colours.map(([r, g, b]) => (255 << 24) | (b << 16) | (g << 8) | r);
  const last = palette.length - 1;
  for (let i = 0, pair = 0; i < nTokens; i++) {
    pixels[i * nTokens + i] = palette[last];
    for (let j = i + 1; j < nTokens; j++, pair++) {
      const colour = palette[pairs[pair] <= 0 ? 0 : Math.round((pairs[pair] / 127) * last)];
      pixels[i * nTokens + j] = pixels[j * nTokens + i] = colour;
    }
  }
  pen.putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(scratch, 0, 0, width, height);
  if (token < 0) return;
  const cell = width / nTokens;
  context.strokeStyle = "#ffffff";
  context.lineWidth = 1.5;
  context.strokeRect(-2, token * cell - 1, width + 4, cell + 2);
  context.strokeRect(token * cell - 1, -2, cell + 2, height + 4);
}

const BINS = 40; // of [-1, 1]

/** The share of pairs in each bin. */
function binned(pairs) {
  const counts = new Float64Array(BINS);
  for (const value of pairs) counts[Math.max(0, Math.min(BINS - 1, Math.floor(((value / 127 + 1) / 2) * BINS)))]++;
  return counts.map((count) => count / nPairs);
}

/** Draw shares by cosine, up to `most`, in the colours of the matrix; `mean` is marked. */
function drawHistogram(canvas, shares, most, mean) {
  const { context, width, height } = prepare(canvas);
  const [bottom, top] = [height - 18, 16];
  const x = (value) => ((value + 1) / 2) * width;
  context.strokeStyle = look.line;
  context.lineWidth = 1;
  path(context, [[0, bottom + 0.5], [width, bottom + 0.5]]);
  context.stroke();
  context.fillStyle = look.soft;
  for (const [value, align] of [[-1, "left"], [0, "center"], [1, "right"]]) {
    context.textAlign = align;
    context.fillText(String(value).replace("-", "−"), x(value), height - 4);
  }
  shares.forEach((share, bin) => {
    const from = -1 + (2 * bin) / BINS;
    const size = (share / most) * (bottom - top);
    context.fillStyle = css(shade(from + 1 / BINS));
    context.fillRect(x(from) + 0.5, bottom - size, width / BINS - 1, size);
    context.strokeStyle = look.soft;
    context.lineWidth = 0.4;
    if (size > 0.5) context.strokeRect(x(from) + 0.5, bottom - size, width / BINS - 1, size);
  });
  context.strokeStyle = look.ink;
  context.lineWidth = 1.5;
  path(context, [[x(mean), top], [x(mean), bottom]]);
  context.stroke();
  context.fillStyle = look.ink;
  context.textAlign = "center";
  const words = `mean ${mean.toFixed(2).replace("-", "−")}`;
  const half = context.measureText(words).width / 2;
  context.fillText(words, Math.max(half, Math.min(width - half, x(mean))), top - 4);
}

/* --- the map of layers and steps ----------------------------------------------------------- */

const MARGIN = { left: 22, bottom: 16 };

/** Draw the mean cosine [steps, layers] of a run, layer 0 at the bottom, with a frame at what is shown. */
function drawMap(canvas, means, step, layer) {
  const { context, width, height } = prepare(canvas);
  const [nSteps, nLayers] = [means.length, means[0].length];
  const cell = [(width - MARGIN.left) / nSteps, (height - MARGIN.bottom) / nLayers];
  const corner = (s, l) => [MARGIN.left + s * cell[0], (nLayers - 1 - l) * cell[1]];
  means.forEach((row, s) =>
    row.forEach((value, l) => {
      context.fillStyle = css(shade(value));
      const [x, y] = corner(s, l);
      context.fillRect(x, y, cell[0] + 0.5, cell[1] + 0.5);
    })
  );
  context.fillStyle = look.soft;
  context.textAlign = "right";
  for (const l of new Set([0, nLayers - 1])) context.fillText(l, MARGIN.left - 5, corner(0, l)[1] + cell[1] / 2 + 4);
  const shown = new Set([0, Math.round((nSteps - 1) / 2), nSteps - 1]);
  for (const s of shown) {
    context.textAlign = s === 0 ? "left" : s === nSteps - 1 ? "right" : "center";
    const at = s === 0 ? MARGIN.left : s === nSteps - 1 ? width : corner(s + 0.5, 0)[0];
    context.fillText(data.steps[s].toLocaleString("en"), at, height - 3);
  }
  const [x, y] = corner(step, layer);
  context.lineWidth = 4;
  context.strokeStyle = "#000000";
  context.strokeRect(x, y, cell[0], cell[1]);
  context.lineWidth = 2;
  context.strokeStyle = "#ffffff";
  context.strokeRect(x, y, cell[0], cell[1]);
}

/** The step and layer at a point of the map, [step, layer]. */
function placeOnMap(canvas, x, y, nSteps, nLayers) {
  const within = (value, n) => Math.max(0, Math.min(n - 1, Math.floor(value * n)));
  const step = within((x - MARGIN.left) / (canvas.clientWidth - MARGIN.left), nSteps);
  const layer = nLayers - 1 - within(y / (canvas.clientHeight - MARGIN.bottom), nLayers);
  return [step, layer];
}
