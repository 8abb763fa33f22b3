// Draws photos with their masks or boxes.

import { shownPixels } from "./predict.js";

const [SMALLEST, LARGEST] = [240, 640]; // longer side of a drawing, in pixels
const COVER = 0.55; // share of a class's colour in the colour of its pixels
const FONT = "600 15px system-ui, sans-serif";
const PLATE = 22; // height of a box's text, in pixels
const [INK, PAPER] = ["#202124", "#ffffff"];

// Returns a canvas with a picture of a size, scaled to what a page shows of it.
export function scaled(source, width, height) {
  const longer = Math.max(width, height);
  const scale = Math.min(Math.max(longer, SMALLEST), LARGEST) / longer;
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = scale < 1; // of a small picture one sees the pixels
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas;
}

// Draws a scaled photo of an original width with a prediction.
export function draw(canvas, photo, { rows, mask }, { width }, palette) {
  canvas.width = photo.width;
  canvas.height = photo.height;
  const context = canvas.getContext("2d");
  context.drawImage(photo, 0, 0);
  if (mask) cover(context, mask, palette);
  const boxed = rows.filter((row) => row.box);
  drawBoxes(context, boxed, photo.width / width, palette);
}

// Lays the classes' colours over a photo, with white lines between them; black leaves it as it is.
function cover(context, mask, palette) {
  const { width, height } = context.canvas;
  const { rows, columns } = shownPixels(mask, width, height);
  const label = (x, y) => mask.data[rows[y] * mask.width + columns[x]];
  const image = context.getImageData(0, 0, width, height);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at += 4) {
      const here = label(x, y);
      const right = x + 1 < width && label(x + 1, y) !== here;
      const below = y + 1 < height && label(x, y + 1) !== here;
      const colour = right || below ? [255, 255, 255] : palette[here];
      const share = right || below ? 1 : colour.some(Boolean) ? COVER : 0;
      for (let channel = 0; channel < 3; channel++) {
        const old = image.data[at + channel];
        image.data[at + channel] = Math.round(old + share * (colour[channel] - old));
      }
    }
  }
  context.putImageData(image, 0, 0);
}

// The best box is drawn last, above the others.
function drawBoxes(context, rows, scale, palette) {
  const { width, height } = context.canvas;
  const line = Math.max(2, Math.round(Math.max(width, height) / 250));
  context.font = FONT;
  context.textBaseline = "middle";
  context.lineJoin = "round";
  for (const { box, label } of [...rows].reverse()) {
    const [x0, y0, x1, y1] = box.map((side) => side * scale);
    for (const [style, thickness] of [
      [ink(palette[label]), line + 2],
      [css(palette[label]), line],
    ]) {
      context.strokeStyle = style;
      context.lineWidth = thickness;
      context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
  }
  const plates = [];
  for (const row of rows) plates.push(plate(context, row, scale, palette, plates));
  for (const { x, y, across, text, colour } of plates.reverse()) {
    context.fillStyle = css(colour);
    context.fillRect(x, y, across, PLATE);
    context.fillStyle = ink(colour);
    context.fillText(text, x + 4, y + PLATE / 2 + 1);
  }
}

// Returns a box's text at the place around it where it covers the least of the others.
function plate(context, { box, name, share, label }, scale, palette, others) {
  const { width, height } = context.canvas;
  const text = `${name} ${percent(share)}`;
  const across = Math.min(width, Math.ceil(context.measureText(text).width) + 8);
  const [x0, y0, x1, y1] = box.map((side) => side * scale);
  const places = [];
  for (const x of [x0, x1 - across]) {
    for (const y of [y0 - PLATE, y0, y1, y1 - PLATE]) {
      places.push({
        x: Math.min(Math.max(0, x), width - across),
        y: Math.min(Math.max(0, y), height - PLATE),
        across,
      });
    }
  }
  const covered = (place) => others.reduce((sum, other) => sum + shared(place, other), 0);
  const best = places.reduce((one, other) => (covered(other) < covered(one) ? other : one));
  return { ...best, text, colour: palette[label] };
}

// The pixels that two plates share.
function shared(one, other) {
  const across =
    Math.min(one.x + one.across, other.x + other.across) - Math.max(one.x, other.x);
  const down = PLATE - Math.abs(one.y - other.y);
  return Math.max(0, across) * Math.max(0, down);
}

export function percent(share) {
  return share > 0 && share < 5e-4 ? "<0.1%" : `${(100 * share).toFixed(1)}%`;
}

export function css([red, green, blue]) {
  return `rgb(${red}, ${green}, ${blue})`;
}

// Black or white, whichever is easier to read on a colour.
function ink([red, green, blue]) {
  return 299 * red + 587 * green + 114 * blue > 128_000 ? INK : PAPER;
}
