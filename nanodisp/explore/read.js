"use strict";
/* The data of the page. Cosines are decoded when their layer is first shown: all of them would take a while. */

const data = JSON.parse(document.getElementById("data").textContent);
const nTokens = data.tokens.length;
const nPairs = (nTokens * (nTokens - 1)) / 2;
const onSphere = data.projection === "cone";

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

for (const run of data.runs) {
  run.places = new Int16Array(bytesOf(run.places).buffer); // [steps, layers, tokens, 2]
  run.cosines = new Map(); // layer -> promise of Int8Array [steps, pairs]
}

/** The layer of a run at the same depth as `layer` of the deepest one. */
function layerOf(run, layer) {
  const deepest = Math.max(...data.runs.map((each) => each.layers)) - 1;
  return deepest === 0 ? 0 : Math.round((layer * (run.layers - 1)) / deepest);
}

/** Where the tokens are, as unit vectors with the pole at y = 1, or as x, y and 0: Float32Array [tokens, 3]. */
function placesOf(run, step, layer) {
  const out = new Float32Array(3 * nTokens);
  const from = (step * run.layers + layer) * nTokens * 2;
  for (let i = 0; i < nTokens; i++) {
    const a = run.places[from + 2 * i] / 32767;
    const b = run.places[from + 2 * i + 1] / 32767;
    if (onSphere) {
      const polar = a * Math.PI, around = b * Math.PI;
      out[3 * i] = Math.sin(polar) * Math.cos(around);
      out[3 * i + 1] = Math.cos(polar);
      out[3 * i + 2] = Math.sin(polar) * Math.sin(around);
    } else {
      out[3 * i] = a;
      out[3 * i + 1] = b;
    }
  }
  return out;
}

/** Promise of the cosines of a layer at all steps, Int8Array [steps, pairs] in units of 1/127. */
function cosinesOf(run, layer) {
  if (!run.cosines.has(layer)) run.cosines.set(layer, inflate(data.runs.indexOf(run), layer));
  return run.cosines.get(layer);
}

async function inflate(number, layer) {
  const element = document.getElementById(`cosines-${number}-${layer}`);
  const packed = new Blob([bytesOf(element.textContent)]);
  const stream = packed.stream().pipeThrough(new DecompressionStream("deflate"));
  const out = new Uint8Array(await new Response(stream).arrayBuffer());
  for (let i = nPairs; i < out.length; i++) out[i] += out[i - nPairs]; // each step is its difference to the one before
  element.remove();
  return new Int8Array(out.buffer);
}

/** The place of a pair of tokens among the pairs of a step. */
function pairOf(i, j) {
  if (i > j) [i, j] = [j, i];
  return (i * (2 * nTokens - i - 1)) / 2 + j - i - 1;
}

/** The cosine of two tokens, of the pairs of one step. */
function cosine(pairs, i, j) {
  return i === j ? 1 : pairs[pairOf(i, j)] / 127;
}

/** A token as it can be read: white space becomes visible. */
function visible(token) {
  return token.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣").replace(/(␣{3})␣+/g, "$1…");
}
