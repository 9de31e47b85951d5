/* The controls: one state, drawn again when it changes. */

const nSteps = data.steps.length;
const nLayers = Math.max(...data.runs.map((run) => run.layers));
const MS_PER_STEP = 420; // while it plays
const MS_TO_MOVE = 300; // from one step to the next
const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;

const state = { step: 0, layer: Math.max(0, nLayers - 2), token: -1, kept: -1, yaw: 0.5, tilt: 0.36, playing: false };
const moving = { from: [], to: [], began: 0, drawn: 0 }; // the tokens on their way from one place to another

const element = (id) => document.getElementById(id);
const panels = [...document.querySelectorAll(".run")].map((article, number) => ({
  run: data.runs[number],
  figures: article.querySelector(".figures"),
  space: article.querySelector(".space"),
  matrix: article.querySelector(".matrix"),
  histogram: article.querySelector(".histogram"),
  map: article.querySelector(".map"),
  points: [], // on the canvas
  places: null, // drawn now
  pairs: null, // cosines of the step
  spread: null, // their histogram
}));
const spans = data.tokens.map((token, i) => {
  const span = document.createElement("span");
  for (const part of token.split(/(\n)/)) {
    if (part === "\n") {
      const mark = document.createElement("i");
      mark.textContent = "↵";
      span.append(mark, "\n");
    } else if (part) span.append(part);
  }
  span.dataset.token = i;
  element("text").append(span);
  return span;
});

/* --- drawing ------------------------------------------------------------------------------- */

let frame = 0;
function redraw() {
  if (!frame) frame = requestAnimationFrame(draw);
}

function draw(now) {
  frame = 0;
  const share = still ? 1 : Math.min(1, (now - moving.began) / MS_TO_MOVE);
  const eased = share * share * (3 - 2 * share);
  panels.forEach((panel, number) => {
    panel.places = between(moving.from[number], moving.to[number], eased);
    panel.points = drawSpace(panel.space, panel.places, panel.pairs, chosen(), state);
  });
  if (share < 1) redraw();
}

/** Places on the way from a to b. */
function between(a, b, share) {
  const out = b.slice();
  if (!a || share >= 1) return out;
  for (let i = 0; i < out.length; i += 3) {
    for (let k = 0; k < 3; k++) out[i + k] = a[i + k] + (b[i + k] - a[i + k]) * share;
    if (!onSphere) continue;
    const length = Math.hypot(out[i], out[i + 1], out[i + 2]) || 1;
    for (let k = 0; k < 3; k++) out[i + k] /= length;
  }
  return out;
}

/** Draw everything but the points on their way: for another step, layer, token or size. */
function drawRest() {
  look = readTheme();
  const most = Math.max(...panels.map((panel) => (panel.spread ? Math.max(...panel.spread) : 0)));
  for (const panel of panels) {
    const layer = layerOf(panel.run, state.layer);
    drawMap(panel.map, panel.run.means, state.step, layer);
    if (!panel.pairs) continue;
    drawMatrix(panel.matrix, panel.pairs, chosen());
    drawHistogram(panel.histogram, panel.spread, most, panel.run.means[state.step][layer]);
  }
  for (const panel of panels) say(panel); // after the drawing, which asks for sizes
  paintText();
  readOut();
  redraw();
}

function say(panel) {
  const layer = layerOf(panel.run, state.layer);
  const mean = panel.run.means[state.step][layer];
  const number = document.createElement("b");
  number.textContent = mean.toFixed(2).replace("-", "−");
  const angle = (Math.acos(Math.sqrt(Math.max(0, (1 + (nTokens - 1) * mean) / nTokens))) * 180) / Math.PI;
  const cone = onSphere ? `, half-angle of the cone ${Math.round(angle)}°` : "";
  const own = data.runs.every((run) => run.layers === nLayers) ? "" : `, layer ${layer}`;
  panel.figures.replaceChildren(number, ` mean cosine${cone}${own}`);
}

let painted = false; // as while no token is chosen
function paintText() {
  const token = chosen();
  if (token < 0 && painted) return;
  painted = token < 0;
  spans.forEach((span, i) => {
    const bars = panels.map((panel) => css(token >= 0 && panel.pairs ? shade(cosine(panel.pairs, token, i)) : shadeOfPlace(i)));
    span.style.backgroundImage = bars.map((colour) => `linear-gradient(${colour}, ${colour})`).join(", ");
    span.style.backgroundPosition = bars.map((_, number) => `0 calc(100% - ${5 * (bars.length - 1 - number)}px)`).join(", ");
    span.classList.toggle("chosen", i === token);
  });
}

/** The chosen token and the most alike, in words. */
function readOut() {
  const token = chosen();
  const target = element("readout");
  if (token < 0 || panels.some((panel) => !panel.pairs)) {
    target.textContent = "Choose a token to see which others it is like.";
    return;
  }
  const name = document.createElement("b");
  name.textContent = visible(data.tokens[token]);
  target.replaceChildren(name, `, token ${token + 1} of ${nTokens}, is most like`);
  panels.forEach((panel) => {
    const others = spans.map((_, i) => i).filter((i) => i !== token);
    others.sort((a, b) => cosine(panel.pairs, token, b) - cosine(panel.pairs, token, a));
    const words = others.slice(0, 4).map((i) => `${visible(data.tokens[i])} ${cosine(panel.pairs, token, i).toFixed(2)}`);
    const line = document.createElement("span");
    line.textContent = (panels.length > 1 ? `${panel.run.name}: ` : "") + words.join(", ");
    target.append(line);
  });
}

/* --- changing the state -------------------------------------------------------------------- */

function chosen() {
  return state.token >= 0 ? state.token : state.kept;
}

/** Show another step or layer; resolves when it is drawn with its cosines. */
async function show(step, layer) {
  state.step = Math.max(0, Math.min(nSteps - 1, step));
  state.layer = Math.max(0, Math.min(nLayers - 1, Math.round(layer)));
  moving.from = panels.map((panel) => panel.places);
  moving.to = panels.map((panel) => placesOf(panel.run, state.step, layerOf(panel.run, state.layer)));
  moving.began = performance.now();
  for (const [id, value, text] of [["step", state.step, data.steps[state.step].toLocaleString("en")], ["layer", state.layer, state.layer]]) {
    element(id).value = value;
    element(id).setAttribute("aria-valuetext", `${id} ${text}`);
    element(`${id}-value`).textContent = `${text} of ${(id === "step" ? data.steps[nSteps - 1] : nLayers - 1).toLocaleString("en")}`;
  }
  redraw();
  const asked = [state.step, state.layer].join();
  const layers = await Promise.all(panels.map((panel) => cosinesOf(panel.run, layerOf(panel.run, state.layer))));
  if (asked !== [state.step, state.layer].join()) return; // another has been asked for
  panels.forEach((panel, number) => {
    panel.pairs = layers[number].subarray(state.step * nPairs, (state.step + 1) * nPairs);
    panel.spread = binned(panel.pairs);
  });
  drawRest();
}

function point(token, keep = false) {
  if (keep) state.kept = token === state.kept ? -1 : token;
  state.token = token;
  drawRest();
}

let timer = 0;
function play(on) {
  clearInterval(timer);
  state.playing = on;
  element("play").textContent = on ? "Pause" : "Play";
  element("play").setAttribute("aria-pressed", on);
  if (!on) return;
  if (state.step === nSteps - 1) show(0, state.layer);
  timer = setInterval(() => {
    if (state.step === nSteps - 1) play(false);
    else show(state.step + 1, state.layer);
  }, MS_PER_STEP);
}

/* --- hands: pointer, touch and keys -------------------------------------------------------- */

/** The token nearest to a place on a panel's sphere, or -1. */
function nearest(panel, x, y, reach) {
  let best = -1, least = reach * reach;
  panel.points.forEach(([px, py, depth], i) => {
    const distance = (px - x) ** 2 + (py - y) ** 2 + (depth < 0 ? 40 : 0); // those in front first
    if (distance < least) [best, least] = [i, distance];
  });
  return best;
}

for (const panel of panels) {
  let drag = null;
  panel.space.addEventListener("pointerdown", (event) => {
    drag = { x: event.clientX, y: event.clientY, yaw: state.yaw, tilt: state.tilt, moved: false };
    panel.space.setPointerCapture(event.pointerId);
  });
  panel.space.addEventListener("pointermove", (event) => {
    if (drag && onSphere) {
      const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
      drag.moved = drag.moved || Math.hypot(dx, dy) > 5;
      if (drag.moved) {
        state.yaw = drag.yaw - dx / 150;
        state.tilt = Math.max(-1.57, Math.min(1.57, drag.tilt + dy / 150));
        return redraw();
      }
    }
    if (event.pointerType === "mouse") point(nearest(panel, event.offsetX, event.offsetY, 16));
  });
  panel.space.addEventListener("pointerup", (event) => {
    if (drag && !drag.moved) {
      const token = nearest(panel, event.offsetX, event.offsetY, event.pointerType === "mouse" ? 16 : 26);
      if (event.pointerType === "mouse") point(token, true);
      else letGo(token);
    }
    drag = null;
  });
  panel.space.addEventListener("pointercancel", () => (drag = null));
  panel.space.addEventListener("pointerleave", () => point(-1));

  const tokenOfRow = (event) => Math.max(0, Math.min(nTokens - 1, Math.floor((event.offsetY / panel.matrix.clientHeight) * nTokens)));
  panel.matrix.addEventListener("pointermove", (event) => point(tokenOfRow(event)));
  panel.matrix.addEventListener("pointerleave", () => point(-1));
  panel.matrix.addEventListener("click", (event) => letGo(tokenOfRow(event)));

  const goTo = (event) => {
    const [step, layer] = placeOnMap(panel.map, event.offsetX, event.offsetY, nSteps, panel.run.layers);
    play(false);
    const deepest = panel.run.layers > 1 ? Math.round((layer * (nLayers - 1)) / (panel.run.layers - 1)) : 0;
    show(step, deepest);
  };
  panel.map.addEventListener("pointerdown", goTo);
  panel.map.addEventListener("pointermove", (event) => event.buttons && goTo(event));
}

/** Keep a token after a tap, or none. */
function letGo(token) {
  state.token = -1;
  state.kept = token === state.kept ? -1 : token;
  drawRest();
}

const tokenAt = (event) => {
  const span = event.target.closest("[data-token]");
  return span ? Number(span.dataset.token) : -1;
};
element("text").addEventListener("pointerover", (event) => event.pointerType === "mouse" && point(tokenAt(event)));
element("text").addEventListener("pointerleave", () => point(-1));
element("text").addEventListener("click", (event) => letGo(tokenAt(event)));

element("play").addEventListener("click", () => play(!state.playing));
element("step").addEventListener("input", (event) => (play(false), show(Number(event.target.value), state.layer)));
element("layer").addEventListener("input", (event) => show(state.step, Number(event.target.value)));

const KEYS = {
  ArrowLeft: () => (play(false), show(state.step - 1, state.layer)),
  ArrowRight: () => (play(false), show(state.step + 1, state.layer)),
  ArrowUp: () => show(state.step, state.layer + 1),
  ArrowDown: () => show(state.step, state.layer - 1),
  Home: () => (play(false), show(0, state.layer)),
  End: () => (play(false), show(nSteps - 1, state.layer)),
  " ": () => play(!state.playing),
  ",": () => letGo((Math.max(0, chosen()) - 1 + nTokens) % nTokens),
  ".": () => letGo((chosen() + 1) % nTokens),
  Escape: () => letGo(-1),
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || !KEYS[event.key]) return;
  if (event.key === " " && event.target.closest("button, summary")) return; // it presses that
  event.preventDefault();
  KEYS[event.key]();
});

window.addEventListener("resize", drawRest);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawRest);
window.addEventListener("error", (event) => fail(event.message));
window.addEventListener("unhandledrejection", (event) => fail(event.reason));

function fail(reason) {
  element("error").hidden = false;
  element("error").textContent = `The page failed: ${reason}. It needs a browser of 2023 or later.`;
}

element("step").max = nSteps - 1;
element("layer").max = nLayers - 1;
const asked = new URLSearchParams(location.hash.slice(1)); // explore.html#step=12&layer=3&token=5
if (asked.has("token")) state.kept = Math.min(nTokens - 1, Number(asked.get("token")) || 0);
const first = asked.has("step") ? data.steps.findIndex((step) => step >= Number(asked.get("step"))) : 0;
show(first < 0 ? nSteps - 1 : first, asked.has("layer") ? Number(asked.get("layer")) || 0 : state.layer);
