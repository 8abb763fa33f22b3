// Starts the page, unless the browser was given a file: then modules and the model do not load.

if (location.protocol === "file:") {
  document.getElementById("status").textContent = "";
  document.getElementById("fault").textContent =
    "This page was opened as a file, from which browsers load no model. Serve its folder: run " +
    "python -m http.server in it, and open http://localhost:8000.";
} else {
  import("./page.js").catch((error) => {
    document.getElementById("status").textContent = "";
    document.getElementById("fault").textContent = `The page cannot start: ${error.message}`;
  });
}
