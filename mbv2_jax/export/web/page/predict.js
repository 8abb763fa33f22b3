// Loads the model, and turns pictures into predictions.
//
// A prediction is {rows, boxes, mask, milliseconds}. Rows are {name, share, label} of classes (or
// of objects, with their box), the best first; a mask is {width, height, data, frame}.

import { prepare, readPixels } from "./preprocess.js";

const MOST_CLASSES = 5; // that a classifier names
const RUNTIME = new URL("runtime/", import.meta.url).href;
const AGAIN = "write the folder again with python -m mbv2_jax.export --to=web";

// A module whose one function has two SIMD instructions: i8x16.splat and i8x16.popcnt.
const SIMD = new Uint8Array([
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15,
  253, 98, 11,
]);

// Returns {facts, run}: model.json, and a function from pixels to named arrays.
export async function load() {
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(SIMD)) {
    throw new Error(
      "this browser has no WebAssembly SIMD, which the runtime needs: update it, or take Chrome " +
        "or Edge 91, Firefox 89, Safari 16.4, or newer",
    );
  }
  const facts = await (await fetched("model.json")).json().catch(() => {
    throw new Error(`model.json is damaged: ${AGAIN}`);
  });
  const [ort, bytes] = await Promise.all([
    runtime(),
    fetched("model.onnx").then((response) => response.arrayBuffer()),
  ]);
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] }).catch(
    (error) => {
      throw new Error(`model.onnx cannot be opened (${error.message}): ${AGAIN}`);
    },
  );
  const run = async ({ width, height, data }) => {
    const images = new ort.Tensor("uint8", data, [1, height, width, 3]);
    return await session.run({ images });
  };
  const [height, width] = facts.image_size; // the first run is slow: let it be of black pixels
  await run({ width, height, data: new Uint8Array(3 * width * height) });
  return { facts, run: oneAfterAnother(run) };
}

async function fetched(name) {
  const response = await fetch(name).catch((error) => {
    throw new Error(`${name} cannot be loaded (${error.message}): is the server still running?`);
  });
  if (!response.ok) {
    throw new Error(`${name} is missing in the folder of the page (${response.status}): ${AGAIN}`);
  }
  return response;
}

async function runtime() {
  const module = (name) =>
    import(RUNTIME + name).catch(() => {
      throw new Error(`runtime/${name} is missing: ${AGAIN}`);
    });
  const ort = await module("ort.wasm.min.js");
  await module("ort-wasm-simd-threaded.js"); // which the runtime loads again, with worse messages
  const binary = await fetched("runtime/ort-wasm-simd-threaded.wasm");
  ort.env.wasm.wasmPaths = { mjs: `${RUNTIME}ort-wasm-simd-threaded.js` };
  ort.env.wasm.wasmBinary = await binary.arrayBuffer();
  ort.env.wasm.numThreads = 1; // more need headers that few static servers send
  ort.env.logLevel = "error";
  return ort;
}

// The camera and dropped photos share a session, which runs one picture at a time.
function oneAfterAnother(run) {
  let last = Promise.resolve();
  return (...values) => {
    const next = last.then(() => run(...values));
    last = next.catch(() => {});
    return next;
  };
}

// Predicts an ImageBitmap or a video frame of a size in pixels.
export async function predict(model, source, width, height) {
  const { facts } = model;
  const start = performance.now();
  const { pixels, transparent } = readPixels(source, width, height);
  const image = prepare(pixels, facts.operations, facts.image_size);
  const ready = performance.now();
  const outputs = await model.run(image.pixels);
  const done = performance.now();
  const arrays = Object.values(outputs).map((tensor) => tensor.data);
  if (!arrays.every((array) => array.every(Number.isFinite))) {
    throw new Error("the model's outputs are not numbers (NaN): its weights are damaged");
  }
  const found = DECODERS[facts.task](outputs, image.frame, facts);
  const milliseconds = { model: done - ready, all: performance.now() - start };
  return { ...found, transparent, milliseconds };
}

const DECODERS = {
  classification({ logits }, frame, { classes }) {
    const shares = softmax(logits.data);
    const order = [...shares.keys()].sort((one, other) => shares[other] - shares[one]);
    const rows = order
      .slice(0, MOST_CLASSES)
      .map((label) => ({ name: classes[label], share: shares[label], label }));
    return { rows };
  },

  segmentation({ logits }, frame, { classes }) {
    const [, height, width, count] = logits.dims;
    const data = argmax(logits.data, count);
    const mask = { width, height, data, frame };
    const rows = [...shownShares(mask, count).entries()]
      .filter(([, share]) => share > 0)
      .sort(([, one], [, other]) => other - one)
      .map(([label, share]) => ({ name: classes[label], share, label }));
    return { rows, mask };
  },

  detection({ boxes, scores }, frame, { classes, image_size, decoding }) {
    const found = suppressed(boxes.data, scores.data, classes.length, image_size, decoding);
    const rows = found
      .map(({ box, share, label }) => ({
        name: classes[label],
        share,
        label,
        box: inPicture(box, image_size, frame),
      }))
      .filter(({ box: [x0, y0, x1, y1] }) => x1 > x0 && y1 > y0);
    return { rows };
  },
};

function softmax(logits) {
  const highest = logits.reduce((one, other) => Math.max(one, other), -Infinity);
  const powers = Array.from(logits, (logit) => Math.exp(logit - highest));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

// The best class of each pixel; of equal logits the first.
function argmax(logits, count) {
  const best = new Uint8Array(logits.length / count);
  for (let pixel = 0, from = 0; pixel < best.length; pixel++, from += count) {
    for (let label = 1; label < count; label++) {
      if (logits[from + label] > logits[from + best[pixel]]) best[pixel] = label;
    }
  }
  return best;
}

// The pixel of a mask's axis that shows each of `count` pixels along the picture.
function nearest(count, start, stop, pixels) {
  return Int32Array.from({ length: count }, (_, index) => {
    const position = Math.floor(((index + 0.5 - start) / (stop - start)) * pixels);
    return Math.min(Math.max(position, 0), pixels - 1);
  });
}

// The rows and columns of a mask that a drawing of the picture shows, {rows, columns}.
export function shownPixels({ width, height, frame }, drawnWidth, drawnHeight) {
  const x = drawnWidth / frame.width;
  const y = drawnHeight / frame.height;
  return {
    rows: nearest(drawnHeight, frame.top * y, frame.bottom * y, height),
    columns: nearest(drawnWidth, frame.left * x, frame.right * x, width),
  };
}

// Each class's share of the picture, 0 to 1.
function shownShares(mask, count) {
  const { frame, width, height, data } = mask;
  const { rows, columns } = shownPixels(mask, frame.width, frame.height);
  const [down, across] = [new Float64Array(height), new Float64Array(width)];
  rows.forEach((row) => down[row]++);
  columns.forEach((column) => across[column]++);
  const shares = new Float64Array(count);
  data.forEach((label, pixel) => {
    const seen = down[Math.floor(pixel / width)] * across[pixel % width];
    shares[label] += seen / (frame.width * frame.height);
  });
  return shares;
}

// ---- Detections, as mbv2_jax/tasks/detection/nms.py chooses them ----

function suppressed(boxes, scores, count, [height, width], rules) {
  const limits = [width, height, width, height];
  const clip = (box) => box.map((side, axis) => Math.min(Math.max(side, 0), limits[axis]));
  const candidates = [];
  for (let anchor = 0; anchor < boxes.length / 4; anchor++) {
    const box = [...boxes.subarray(4 * anchor, 4 * anchor + 4)];
    const inside = clip(box);
    if (inside[2] <= inside[0] || inside[3] <= inside[1]) continue; // outside the image
    for (let label = 0; label < count; label++) {
      const share = scores[anchor * count + label];
      if (share > rules.score_threshold) {
        candidates.push({ box: rules.clip_first ? inside : box, share, label });
      }
    }
  }
  candidates.sort((one, other) => other.share - one.share); // stable: the first of equal ones
  const taken = [];
  for (const candidate of candidates.slice(0, rules.candidates)) {
    if (taken.length === rules.max_detections) break;
    const rival = (other) =>
      other.label === candidate.label && overlap(other.box, candidate.box) > rules.nms_iou;
    if (!taken.some(rival)) taken.push(candidate);
  }
  return taken.map((one) => ({ ...one, box: clip(one.box) }));
}

// The intersection over union of two boxes.
function overlap(one, other) {
  const across = Math.min(one[2], other[2]) - Math.max(one[0], other[0]);
  const down = Math.min(one[3], other[3]) - Math.max(one[1], other[1]);
  const shared = Math.max(0, across) * Math.max(0, down);
  return shared / (area(one) + area(other) - shared);
}

function area([x0, y0, x1, y1]) {
  return (x1 - x0) * (y1 - y0);
}

// A box of the network's image in the picture's pixels, clipped to it.
function inPicture([x0, y0, x1, y1], [height, width], frame) {
  const x = (frame.right - frame.left) / width;
  const y = (frame.bottom - frame.top) / height;
  const across = (side) => Math.min(Math.max(frame.left + side * x, 0), frame.width);
  const down = (side) => Math.min(Math.max(frame.top + side * y, 0), frame.height);
  return [across(x0), down(y0), across(x1), down(y1)];
}
