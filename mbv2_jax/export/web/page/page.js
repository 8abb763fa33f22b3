// The page: photos and camera in, results out.

import { css, draw, percent, scaled } from "./draw.js";
import { load, predict } from "./predict.js";

const KEPT = 50; // results of photos, since each takes memory
const SPOKEN = 5; // classes or objects that a screen reader is told
const PAUSE = 3000; // milliseconds between two announcements of the camera's best class
const TASKS = { classification: "labels", detection: "boxes", segmentation: "masks" };
const TRANSPARENT = "Parts of this picture are transparent: they count as black.";
const COLUMNS = { classification: "Probability", detection: "Score", segmentation: "Area" };

const { title, about, files, drop, camera, clear, boxes, least, shown, fault, status, ...rest } =
  Object.fromEntries([...document.querySelectorAll("[id]")].map((found) => [found.id, found]));
const { live, list, facts } = rest;

let model;
const redraws = new Map(); // article -> a function that draws its boxes again

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function complain(text) {
  fault.textContent = text;
}

// ---- Results ----

function threshold() {
  return boxes.hidden ? 0 : Number(least.value) / 100;
}

// A class's name; for an object, with its place.
function nameCell({ name, label, box }) {
  const { palette } = model.facts.decoding;
  const cell = element("th", { scope: "row" });
  if (palette) {
    const swatch = element("span", { className: "swatch" });
    // Black leaves the photo as it is, and its square empty.
    if (palette[label].some(Boolean)) swatch.style.backgroundColor = css(palette[label]);
    cell.append(swatch);
  }
  cell.append(element("span", { className: "name", textContent: name }));
  if (box) {
    const [x0, y0, x1, y1] = box.map(Math.round);
    cell.append(element("small", { textContent: `x ${x0}–${x1}, y ${y0}–${y1}` }));
  }
  return cell;
}

// A table of the classes, or of the objects; exact values are in its <data> elements.
function table(rows) {
  const share = COLUMNS[model.facts.task];
  const header = element("tr", {}, element("th", { scope: "col", textContent: "Class" }));
  header.append(element("th", { scope: "col", className: "number", textContent: share }));
  const lines = rows.map((row) => {
    const bar = element("span", { className: "bar" }, element("span"));
    bar.firstChild.style.width = `${100 * row.share}%`;
    const value = element("data", { value: row.share, textContent: percent(row.share) });
    return element("tr", {}, nameCell(row), element("td", { className: "number" }, bar, value));
  });
  return element("table", {}, element("thead", {}, header), element("tbody", {}, ...lines));
}

function inWords(rows) {
  return rows.map(({ name, share }) => `${name} ${percent(share)}`).join(", ");
}

// Fills an article with a photo and its prediction; returns the best of it in words.
function show(article, name, photo, size, prediction) {
  const { palette } = model.facts.decoding;
  const canvas = article.querySelector("canvas") ?? element("canvas");
  const { model: alone, all } = prediction.milliseconds;
  const times = `${alone.toFixed(0)} ms in the model, ${all.toFixed(0)} ms with preparation`;
  const redraw = () => {
    const rows = prediction.rows.filter((row) => !row.box || row.share >= threshold());
    const words = inWords(rows.slice(0, SPOKEN)) || "no object";
    draw(canvas, photo, { ...prediction, rows }, size, palette);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${name}: ${words}`);
    const found = element("div", {}, element("h3", { textContent: name }));
    found.append(rows.length ? table(rows) : element("p", { textContent: "No object is found." }));
    found.append(element("p", { className: "times", textContent: times }));
    if (prediction.transparent) found.append(element("p", { textContent: TRANSPARENT }));
    article.replaceChildren(canvas, found);
    return words;
  };
  redraws.set(article, redraw);
  return redraw();
}

function remove(article) {
  redraws.delete(article);
  (article.closest("li") ?? article).remove();
}

function showThreshold() {
  shown.textContent = `${least.value}%`;
  least.setAttribute("aria-valuetext", shown.textContent);
}

least.addEventListener("input", () => {
  showThreshold();
  redraws.forEach((redraw) => redraw());
});

clear.addEventListener("click", () => {
  list.querySelectorAll("article").forEach(remove);
  clear.disabled = true;
  complain("");
  status.textContent = "All results are removed.";
  files.focus();
});

// ---- Photos ----

async function decode(file) {
  try {
    // The file's own pixels, upright: no conversion of colours, as in training.
    return await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    throw new Error("it is no image that this browser can read");
  }
}

async function takePhoto(file) {
  const bitmap = await decode(file);
  try {
    const { width, height } = bitmap;
    const prediction = await predict(model, bitmap, width, height);
    const article = element("article");
    const photo = scaled(bitmap, width, height);
    const words = show(article, file.name, photo, { width, height }, prediction);
    list.prepend(element("li", {}, article));
    while (list.children.length > KEPT) remove(list.lastElementChild.firstElementChild);
    clear.disabled = false;
    return words;
  } finally {
    bitmap.close();
  }
}

async function takePhotos(chosen) {
  complain("");
  const faults = [];
  let said = "";
  for (const [index, file] of chosen.entries()) {
    if (chosen.length > 1) status.textContent = `Photo ${index + 1} of ${chosen.length} …`;
    try {
      said = `${file.name}: ${await takePhoto(file)}`;
    } catch (error) {
      faults.push(`${file.name}: ${error.message}.`);
      complain(faults.join(" "));
    }
  }
  const good = chosen.length - faults.length;
  const limit = list.children.length < KEPT ? "" : ` The newest ${KEPT} are kept.`;
  status.textContent = good > 1 ? `${good} photos are done, the last one first.${limit}` : said;
}

files.addEventListener("change", async () => {
  const chosen = [...files.files];
  files.value = ""; // so that the same file can be chosen again
  await takePhotos(chosen);
});

for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragenter" || kind === "dragover");
  });
}

addEventListener("drop", async (event) => {
  const chosen = [...event.dataTransfer.files];
  if (!model) complain("The model is not loaded yet: wait for it, then drop the photos again.");
  else if (chosen.length) await takePhotos(chosen);
  else complain("That was no file: drop photos from a folder.");
});

// ---- Camera ----

const REFUSALS = {
  NotAllowedError:
    "The camera is refused: allow it for this page in the browser's settings, then try again.",
  NotFoundError: "There is no camera on this device.",
  NotReadableError: "The camera cannot be read: close other programs that use it, then try again.",
};

let stream = null;
let opening = false;

camera.addEventListener("click", async () => {
  if (stream) return stopCamera("The camera is off.");
  if (opening) return;
  complain("");
  opening = true;
  const current = await openCamera();
  opening = false;
  if (!current) return;
  stream = current;
  camera.textContent = "Turn off the camera";
  try {
    await watch(current);
  } catch (error) {
    if (stream !== current) return; // it was turned off meanwhile
    stopCamera("");
    complain(`The camera stopped: ${error.message}.`);
  }
});

addEventListener("pagehide", () => stopCamera(""));

// Returns a stream of the camera; null, with a complaint, where there is none.
async function openCamera() {
  if (!navigator.mediaDevices) {
    complain("Browsers give the camera only to pages on https:// and on localhost.");
    return null;
  }
  try {
    const video = { facingMode: "environment" };
    return await navigator.mediaDevices.getUserMedia({ video, audio: false });
  } catch (error) {
    complain(REFUSALS[error.name] ?? `The camera cannot be turned on: ${error.message}.`);
    return null;
  }
}

function stopCamera(words) {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  redraws.delete(live);
  live.hidden = true;
  live.replaceChildren();
  camera.textContent = "Turn on the camera";
  status.textContent = words;
}

// Predicts one frame after another, until the camera is turned off.
async function watch(current) {
  const video = element("video", { srcObject: current, muted: true, playsInline: true });
  current.getVideoTracks()[0].addEventListener("ended", () => stopCamera("The camera is gone."));
  await video.play();
  let [told, best] = [-Infinity, null];
  while (stream === current) {
    const frame = await createImageBitmap(video);
    const { width, height } = frame;
    const photo = scaled(frame, width, height);
    const prediction = await predict(model, frame, width, height);
    frame.close();
    if (stream !== current) break;
    live.hidden = false;
    const words = show(live, "Camera", photo, { width, height }, prediction);
    const now = prediction.rows[0]?.name;
    if (now !== best && performance.now() - told > PAUSE) {
      [told, best] = [performance.now(), now];
      status.textContent = `Camera: ${words}`;
    }
    await new Promise(requestAnimationFrame);
  }
  video.srcObject = null;
}

// ---- Start ----

function introduce({ name, task, classes, image_size: [height, width], exporter }) {
  title.textContent = name;
  document.title = `${name}: ${TASKS[task]} of photos`;
  about.textContent =
    `Shows the ${TASKS[task]} that a MobileNetV2 finds in photos. It runs in this browser: photos ` +
    "stay on this device.";
  facts.textContent =
    `${classes.length} ${classes.length === 1 ? "class" : "classes"}, images of ${width} x ${height} pixels, written by ${exporter}, ` +
    "run by ONNX Runtime Web.";
  boxes.hidden = task !== "detection";
  showThreshold();
}

try {
  status.textContent = "Loading the model …";
  model = await load();
  introduce(model.facts);
  for (const control of [files, camera]) control.disabled = false;
  status.textContent = "The model is ready.";
  document.documentElement.dataset.ready = "";
  navigator.serviceWorker?.register("offline.js").catch(() => {}); // only on https and localhost
} catch (error) {
  status.textContent = "";
  complain(`The page cannot run: ${error.message}.`);
}
