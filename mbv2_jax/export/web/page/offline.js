// A service worker that keeps the last version of each file, for when the server cannot be reached.

const CACHE = `mbv2_jax ${registration.scope}`;
const FILES = [
  "./",
  "draw.js",
  "model.json",
  "model.onnx",
  "page.js",
  "predict.js",
  "preprocess.js",
  "runtime/ort-wasm-simd-threaded.js",
  "runtime/ort-wasm-simd-threaded.wasm",
  "runtime/ort.wasm.min.js",
  "start.js",
  "style.css",
];

addEventListener("install", (event) => {
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(FILES)));
  skipWaiting();
});

addEventListener("activate", (event) => event.waitUntil(clients.claim()));

addEventListener("fetch", (event) => {
  if (event.request.method === "GET") event.respondWith(newest(event));
});

// The server's file, which is kept; without a server, the kept one.
async function newest(event) {
  const cache = await caches.open(CACHE);
  try {
    const response = await fetch(event.request);
    if (response.ok) event.waitUntil(cache.put(event.request, response.clone()));
    return response;
  } catch (error) {
    const kept = await cache.match(event.request, { ignoreSearch: true });
    if (!kept) throw error;
    return kept;
  }
}
