// Turns a picture of any size into the network's image, with the pixels that Pillow gives.
//
// Pixels are {width, height, data}: a Uint8Array of R, G and B, row after row. A frame says which
// part of the picture an image shows: the picture's width and height, and left, top, right and
// bottom of the part in the picture's pixels, beyond which it reaches where the image is padded.

const STRIP = 1024; // rows that are read at once, since phones limit the area of a canvas

// Reads an ImageBitmap or a video frame; transparent is true where a pixel is not opaque.
export function readPixels(source, width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = Math.min(STRIP, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const data = new Uint8Array(3 * width * height);
  let transparent = false;
  for (let top = 0, to = 0; top < height; top += STRIP) {
    const rows = Math.min(STRIP, height - top);
    context.clearRect(0, 0, width, rows);
    context.drawImage(source, 0, -top, width, height);
    const strip = context.getImageData(0, 0, width, rows).data;
    for (let from = 0; from < strip.length; from += 4, to += 3) {
      data[to] = strip[from];
      data[to + 1] = strip[from + 1];
      data[to + 2] = strip[from + 2];
      transparent ||= strip[from + 3] < 255;
    }
  }
  return { pixels: { width, height, data }, transparent };
}

// Applies the operations of model.json; returns the network's pixels and their frame.
export function prepare(pixels, operations, [height, width]) {
  const { width: across, height: down } = pixels;
  const frame = { width: across, height: down, left: 0, top: 0, right: across, bottom: down };
  let image = { pixels, frame };
  for (const { name, ...values } of operations) image = OPERATIONS[name](image, values);
  if (image.pixels.width !== width || image.pixels.height !== height) {
    throw new Error(
      `the picture of ${across} x ${down} pixels becomes ` +
        `${image.pixels.width} x ${image.pixels.height}, and the model takes ${width} x ${height}`,
    );
  }
  return image;
}

// The package's operations (data/transforms/resize_and_crop.py and scale_and_pad.py).
const OPERATIONS = {
  // The short side becomes `scale`, the long one is cut to a whole number.
  resize_edge(image, { scale, interpolation }) {
    const { width, height } = image.pixels;
    const size =
      width < height
        ? [Math.trunc((scale * height) / width), scale]
        : [scale, Math.trunc((scale * width) / height)];
    return resized(image, size, interpolation);
  },

  center_crop(image, { crop_size }) {
    const [height, width] = sides(crop_size);
    const across = image.pixels.width - width;
    const down = image.pixels.height - height;
    if (across < 0 || down < 0) {
      throw new Error(
        `the picture is too small: ${image.pixels.width} x ${image.pixels.height} pixels, ` +
          `and the model takes a part of ${width} x ${height}`,
      );
    }
    return cropped(image, halfEven(across), halfEven(down), width, height, [0, 0, 0]);
  },

  resize(image, { scale, interpolation }) {
    return resized(image, sides(scale), interpolation);
  },

  // Shrinks a picture that is larger than a size to the largest that fits inside it.
  fit(image, { size, interpolation }) {
    const { width, height } = image.pixels;
    const [most, widest] = sides(size);
    const factor = Math.min(1, most / height, widest / width);
    const scaled = [height, width].map((side) => Math.max(1, Math.trunc(side * factor + 0.5)));
    return resized(image, scaled, interpolation);
  },

  // On the right and below.
  pad(image, { size, fill }) {
    const [height, width] = sides(size);
    const { width: across, height: down } = image.pixels;
    return cropped(image, 0, 0, Math.max(width, across), Math.max(height, down), fill);
  },
};

// A size is the side of a square, or [height, width].
function sides(size) {
  return Array.isArray(size) ? size : [size, size];
}

// Half of a whole number, rounded as Python rounds: a half goes to the even neighbour.
function halfEven(number) {
  return number % 2 ? 2 * Math.round(number / 4) : number / 2;
}

function cropped({ pixels, frame }, left, top, width, height, fill) {
  const data = new Uint8Array(3 * width * height);
  for (let at = 0; at < data.length; at++) data[at] = fill[at % 3];
  const columns = Math.min(width, pixels.width - left);
  const rows = Math.min(height, pixels.height - top);
  for (let row = 0; row < rows; row++) {
    const start = 3 * ((top + row) * pixels.width + left);
    data.set(pixels.data.subarray(start, start + 3 * columns), 3 * row * width);
  }
  const x = (frame.right - frame.left) / pixels.width;
  const y = (frame.bottom - frame.top) / pixels.height;
  const part = {
    left: frame.left + left * x,
    top: frame.top + top * y,
    right: frame.left + (left + width) * x,
    bottom: frame.top + (top + height) * y,
  };
  return { pixels: { width, height, data }, frame: { ...frame, ...part } };
}

// ---- Pillow's resize (src/libImaging/Resample.c): two passes, each rounded to 8 bits ----

const BITS = 22; // of a weight's fraction
const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, weight: cubic },
};

function cubic(x) {
  const far = Math.abs(x);
  if (far < 1) return (1.5 * far - 2.5) * far * far + 1;
  return far < 2 ? ((2.5 - 0.5 * far) * far - 4) * far + 2 : 0;
}

function resized({ pixels, frame }, [height, width], interpolation) {
  const filter = FILTERS[interpolation];
  const across = (image) => (width === image.width ? image : resizeRows(image, width, filter));
  const down = (image) => (height === image.height ? image : resizeColumns(image, height, filter));
  // Pillow 13 shrinks the height first if that takes away many more pixels; those before did not.
  const fewer = pixels.height - height;
  const downFirst = fewer > 0 && fewer > 2 * (pixels.width - width);
  return { pixels: downFirst ? across(down(pixels)) : down(across(pixels)), frame };
}

// The pixels that each output pixel is the weighted sum of; shrinking widens the filter.
function windows(from, to, filter) {
  const scale = from / to;
  const widening = Math.max(1, scale);
  const support = filter.support * widening;
  return Array.from({ length: to }, (_, index) => {
    const centre = (index + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const last = Math.min(from, Math.trunc(centre + support + 0.5));
    const exact = Array.from({ length: last - first }, (_, tap) =>
      filter.weight((first + tap - centre + 0.5) * (1 / widening)),
    );
    const sum = exact.reduce((total, weight) => total + weight, 0);
    const weights = Int32Array.from(exact, (weight) => {
      const whole = (weight / sum) * 2 ** BITS;
      return Math.trunc(whole < 0 ? whole - 0.5 : whole + 0.5);
    });
    return { first, weights };
  });
}

// The weights of a window sum to 1, and their absolute values to less than 2: 32 bits are enough.
function toByte(sum) {
  const value = sum >> BITS;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

function resizeRows({ width, height, data }, newWidth, filter) {
  const result = new Uint8Array(3 * newWidth * height);
  const found = windows(width, newWidth, filter);
  for (let row = 0, to = 0; row < height; row++) {
    for (const { first, weights } of found) {
      let [red, green, blue] = [1 << (BITS - 1), 1 << (BITS - 1), 1 << (BITS - 1)];
      let from = 3 * (row * width + first);
      for (let tap = 0; tap < weights.length; tap++, from += 3) {
        red += data[from] * weights[tap];
        green += data[from + 1] * weights[tap];
        blue += data[from + 2] * weights[tap];
      }
      result[to++] = toByte(red);
      result[to++] = toByte(green);
      result[to++] = toByte(blue);
    }
  }
  return { width: newWidth, height, data: result };
}

function resizeColumns({ width, height, data }, newHeight, filter) {
  const stride = 3 * width;
  const result = new Uint8Array(stride * newHeight);
  const sums = new Int32Array(stride);
  windows(height, newHeight, filter).forEach(({ first, weights }, row) => {
    sums.fill(1 << (BITS - 1));
    weights.forEach((weight, tap) => {
      const from = (first + tap) * stride;
      for (let at = 0; at < stride; at++) sums[at] += data[from + at] * weight;
    });
    for (let at = 0; at < stride; at++) result[row * stride + at] = toByte(sums[at]);
  });
  return { width, height: newHeight, data: result };
}
