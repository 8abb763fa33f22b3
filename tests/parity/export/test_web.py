"""The page of --to=web in Chromium, compared with JAX; and the command that writes it."""

import base64
import io
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import mbv2_jax
from mbv2_jax import inference, model_dir, tasks
from mbv2_jax.errors import RunFailed, UserError
from mbv2_jax.export import program, web
from mbv2_jax.export.formats import Options
from mbv2_jax.export.web import runtime
from mbv2_jax.model_json import Description
from mbv2_jax.spec import Backbone, ModelSpec, Preprocessing
from mbv2_jax.tasks.classification import settings as classification
from mbv2_jax.tasks.detection import settings as detection
from mbv2_jax.tasks.segmentation import settings as segmentation
from mbv2_jax.tasks.task import Task
from tests.support import browser, commands, short_network, tiny_model

NAMES = ("cat", "dog", "eel")

# Of odd sizes, with every operation that the page has.
SPECS = {
    "classification": ModelSpec(
        "classification",
        Backbone(width=0.1),
        classification.Head(3),
        Preprocessing(33, "resize_edge(39)|center_crop(size)", tiny_model.MEAN, tiny_model.STD),
    ),
    "segmentation": ModelSpec(
        "segmentation",
        Backbone(width=0.1, output_stride=16, last_convolution=False),
        segmentation.Head(3, (6,)),
        Preprocessing(49, "fit(size)|pad(size)", tiny_model.MEAN, tiny_model.STD),
    ),
    "detection": ModelSpec(
        "detection",
        Backbone(width=0.1, padding="same"),
        detection.Head(
            3,
            ("layer7", "last"),
            extra_channels=(16,),
            anchor_sizes=(0.2, 0.4, 0.6, 0.8),
            max_detections=40,
        ),
        Preprocessing(65, "resize((65, 65), 'bicubic')", tiny_model.MEAN, tiny_model.STD),
    ),
}

# Models of other frameworks, in the checking material, with trained weights.
REAL = {
    "classification": "weights/mm_mobilenet_v2.pth",
    "segmentation": "golden/deeplab_tf/deeplabv3_257_mv_gpu.tflite",
    "detection": "golden/ssdlite_tf/frozen_inference_graph.pb",
}

# Probabilities, scores and areas: the pixels are equal, and single-threaded WebAssembly rounds
# float32 in another order than XLA.
CLOSE = 1e-3

READY = "document.documentElement.dataset.ready !== undefined"
FAULT = "document.querySelector('#fault').textContent"
STATUS = "document.querySelector('#status').textContent"
RESULTS = """[...document.querySelectorAll('#list li')].map((item) => ({
  name: item.querySelector('h3').textContent,
  rows: [...item.querySelectorAll('tbody tr')].map((row) => ({
    name: row.querySelector('.name').textContent,
    share: Number(row.querySelector('data').value),
    place: row.querySelector('small')?.textContent.match(/[0-9]+/g).map(Number),
  })),
}))"""


@pytest.fixture(scope="module")
def chromium():
    with browser.started(*browser.CAMERA) as found:
        yield found


@pytest.fixture(scope="module")
def onnxruntime_web(tmp_path_factory) -> pathlib.Path:
    """The runtime's files, as `npm ci` brings them into the cache."""
    try:
        return runtime.files(None)[0].parent
    except (UserError, RunFailed) as error:
        pytest.skip(str(error))


def write_model(task: Task, spec: ModelSpec, path: pathlib.Path) -> pathlib.Path:
    """Writes a random model, whose probabilities are far from 0 and 1, where all would be alike."""
    arrays = tiny_model.filled(model_dir.shapes_of(task.network(spec.backbone, spec.mode)))
    for name, layer in arrays["params"].items():
        if name.startswith(("classifier", "logits", "class_logits")):
            arrays["params"][name] = jax.tree.map(lambda array: array / 10, layer)
    description = Description(spec, task.classes, {"kind": "made by a test"})
    model_dir.write(path, **arrays, description=description)
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory, onnxruntime_web) -> dict[str, pathlib.Path]:
    """A page with a short random network of each task, beside its model, TASK_model."""
    folder = tmp_path_factory.mktemp("pages")
    for task, spec in SPECS.items():
        with short_network.in_use():
            made = tasks.find(task).for_model(spec.head, NAMES)
            path = write_model(made, spec, folder / f"{task}_model")
            written = program.Program(inference.open_model(path, seed=0), batch=1)
            web.write(written, folder / task, Options(runtime=onnxruntime_web))
    return {task: folder / task for task in SPECS}


@pytest.fixture
def page(pages, tmp_path) -> pathlib.Path:
    """A copy of the classifier's page, to be damaged."""
    return shutil.copytree(pages["classification"], tmp_path / "page")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[pathlib.Path]:
    """Photos of several shapes, smaller and larger than the networks' images; one is turned."""
    folder = tmp_path_factory.mktemp("photos")
    files = [folder / f"{name}.png" for name in ("wide", "tall", "small", "turned")]
    sizes = [(70, 50), (41, 83), (40, 39), (120, 60)]
    for seed, (file, size) in enumerate(zip(files, sizes, strict=True)):
        exif = Image.Exif()
        if file.stem == "turned":
            exif[0x0112] = 6  # the stored pixels are to be turned by 90 degrees
        tiny_model.photo(seed).resize(size).save(file, exif=exif)
    return files


def shown(chromium: browser.Browser, count: int) -> dict[str, list[dict[str, Any]]]:
    """Waits for results; returns the rows of each by the photo's name, the best first."""
    chromium.wait(f"document.querySelectorAll('#list li').length === {count} || {FAULT} !== ''")
    results = chromium.evaluate(RESULTS)
    assert len(results) == count, chromium.evaluate(FAULT)
    return {result["name"]: result["rows"] for result in results}


def golden_pictures(archive: pathlib.Path, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the ten pictures of an archive at another size; returns their files."""
    files = [folder / f"{k}.png" for k in range(10)]
    with np.load(archive) as golden:
        for k, file in enumerate(files):
            Image.fromarray(golden[f"image_{k}_u8"]).resize((500, 375)).save(file)
    return files


def show_all_boxes(chromium: browser.Browser) -> None:
    chromium.evaluate(
        "(() => { const least = document.querySelector('#least'); least.value = 0;"
        "least.dispatchEvent(new Event('input')); })()"
    )


def assert_like_jax(
    predictor: inference.Predictor, prediction: Any, rows: list[dict[str, Any]]
) -> None:
    """Asserts that rows of the page are those of a prediction."""
    if "pred_scores" in prediction:
        scores = prediction["pred_scores"]
        best = (-scores).argsort()[:5]
        names, expected = [predictor.class_names[label] for label in best], scores[best]
    elif "areas" in prediction:
        names, expected = prediction["classes"], prediction["areas"]
    else:
        names, expected = prediction["classes"], prediction["scores"]
        corners = prediction["boxes"][:, [0, 2, 1, 3]]
        places = np.reshape([row["place"] for row in rows], (-1, 4))
        np.testing.assert_allclose(places, corners, rtol=0, atol=0.51)  # they are whole pixels
    assert [row["name"] for row in rows] == list(names)
    found = [row["share"] for row in rows]
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("task", list(SPECS))
def test_dropped_photos_get_the_predictions_of_jax(task, pages, photos, chromium, few_layers):
    with browser.served(pages[task]) as url:
        chromium.open(url)
        chromium.wait(READY)
        chromium.drop(*photos)
        shown(chromium, len(photos))
        if task == "detection":
            show_all_boxes(chromium)
        results = shown(chromium, len(photos))
    predictor = mbv2_jax.init_model(pages[task].with_name(f"{task}_model"))
    for photo in photos:
        assert_like_jax(predictor, predictor.predict(photo)[0], results[photo.name])


@pytest.mark.parametrize(
    "task",
    [
        pytest.param(task, marks=[pytest.mark.slow] if task != "classification" else [])
        for task in REAL
    ],
)
def test_real_photos_get_the_predictions_of_jax(
    task, chromium, onnxruntime_web, check_data, cache, tmp_path
):
    found = sorted((check_data / "data" / "imagenet_val20").rglob("*.JPEG"))[:20]
    if task != "classification":  # pictures with objects that the model knows
        found = golden_pictures((check_data / REAL[task]).with_name("golden.npz"), tmp_path)
    model = check_data / REAL[task]
    code, out, err = commands.run(
        cache,
        str(model),
        "--to=web",
        f"--output={tmp_path / 'page'}",
        f"--runtime={onnxruntime_web}",
        "--json",
        module="mbv2_jax.export",
    )
    assert code == 0, err
    assert max(json.loads(out)["difference"].values()) < CLOSE
    with browser.served(tmp_path / "page") as url:
        chromium.open(url)
        chromium.wait(READY)
        chromium.drop(*found)
        results = shown(chromium, len(found))
    predictor = mbv2_jax.init_model(model)
    for file, prediction in zip(found, predictor.predict(found), strict=True):
        if task == "detection":  # those that the page shows at first
            prediction = predictor.task.confident(prediction, 0.3)
        assert_like_jax(predictor, prediction, results[file.name])


def test_masks_are_drawn_as_by_predict(pages, photos, chromium, few_layers):
    file = photos[0].with_name("large.png")
    tiny_model.photo(9).resize((500, 375)).save(file)
    with browser.served(pages["segmentation"]) as url:
        chromium.open(url)
        chromium.wait(READY)
        chromium.choose(file)
        shown(chromium, 1)
        drawn = chromium.evaluate("document.querySelector('canvas').toDataURL()")
    ours = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn.partition(",")[2]))))
    predictor = mbv2_jax.init_model(pages["segmentation"].with_name("segmentation_model"))
    prediction = predictor.predict(file)[0]
    assert len(prediction["classes"]) > 1
    theirs = np.asarray(predictor.task.draw(Image.open(file), prediction, 3))[:375]
    # Two roundings of a half of a level.
    assert abs(ours[..., :3].astype(int) - theirs).max() <= 1


OPERATIONS = [
    ("resize_edge(24)|center_crop(24)", (61, 40)),  # the crop's offset is a half
    ("resize_edge(25, 'bicubic')|center_crop((25, 20))", (40, 61)),
    ("resize_edge(90)|center_crop(85)", (40, 61)),  # enlarges
    ("resize((31, 47), 'bicubic')", (64, 99)),
    ("resize((300, 200), 'bicubic')", (13, 17)),
    ("resize(17)", (1, 400)),
    ("resize((20, 61), 'bicubic')", (41, 20)),  # the height first, as in the next one
    ("resize((33, 20))", (61, 33)),
    ("resize((35, 20))", (61, 33)),  # just not the height first
    ("fit(33)|pad(33)", (41, 67)),
    ("fit(70)|pad((70, 80), (1, 2, 3))", (41, 67)),  # fits as it is
    ("pad(90)|resize(45)", (41, 67)),
    ("center_crop((41, 20))|resize(33)", (41, 67)),
]


@pytest.mark.parametrize(("operations", "size"), OPERATIONS)
def test_pixels_are_those_of_pillow(operations, size, pages, chromium):
    preprocessing = Preprocessing(33, operations)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = preprocessing.transform.from_image(pixels)
    steps = web.operations(preprocessing)
    height, width = preprocessing.transform.output_size
    with browser.served(pages["classification"]) as url:
        chromium.open(url)
        values = f"new Uint8Array({pixels.ravel().tolist()})"
        found = chromium.evaluate(
            f"""(async () => {{
              const {{ prepare }} = await import("./preprocess.js");
              const picture = {{ width: {size[1]}, height: {size[0]}, data: {values} }};
              const image = prepare(picture, {json.dumps(steps)}, {[height, width]});
              return {{ data: [...image.pixels.data], frame: image.frame }};
            }})()"""
        )
    np.testing.assert_array_equal(
        np.reshape(found["data"], (height, width, 3)), np.asarray(expected.image)
    )
    frame = found["frame"]
    assert expected.frame is not None
    assert (frame["width"], frame["height"]) == expected.frame.size
    extent = [frame[side] for side in ("left", "top", "right", "bottom")]
    np.testing.assert_allclose(extent, expected.frame.extent, rtol=1e-12)


def test_a_page_loads_its_own_files_alone(pages, photos, chromium):
    with browser.served(pages["classification"]) as url:
        chromium.open(url)
        chromium.wait(READY)
        chromium.choose(photos[0])
        shown(chromium, 1)
        log = chromium.log()
    names = {request.removeprefix(url) for request in log["requests"]}
    written = [path for path in pages["classification"].rglob("*") if path.is_file()]
    assert names <= {"", *(str(path.relative_to(pages["classification"])) for path in written)}
    assert log["complaints"] == []  # nor does its Content-Security-Policy forbid anything


def test_a_page_works_without_its_server(pages, photos, chromium):
    with browser.served(pages["classification"]) as url:
        chromium.open(url)
        chromium.wait(READY)
        chromium.choose(photos[0])
        before = shown(chromium, 1)
        # It holds its files once it controls the page.
        chromium.wait("navigator.serviceWorker.controller !== null")
    chromium.reload()
    chromium.wait(READY)
    chromium.choose(photos[0])
    assert shown(chromium, 1) == before


def test_a_file_that_is_no_image_is_named_and_the_others_are_shown(
    pages, photos, chromium, tmp_path
):
    text, cut = tmp_path / "notes.png", tmp_path / "cut.png"
    text.write_text("no image")
    cut.write_bytes(photos[0].read_bytes()[:60])
    with browser.served(pages["classification"]) as url:
        chromium.open(url)
        chromium.wait(READY)
        chromium.drop(text, photos[0], cut)
        chromium.wait(f"{FAULT}.includes('cut.png')")
        assert list(shown(chromium, 1)) == [photos[0].name]
        chromium.wait(f"{STATUS}.startsWith('{photos[0].name}: ')")
        assert chromium.evaluate(FAULT) == (
            "notes.png: it is no image that this browser can read. "
            "cut.png: it is no image that this browser can read."
        )
        chromium.choose(photos[1])
        chromium.wait(f"{FAULT} === ''")


def test_a_photo_that_is_too_small_is_refused_as_by_predict(page, chromium, tmp_path):
    facts = json.loads((page / "model.json").read_text())
    facts["operations"] = facts["operations"][1:]  # the crop alone
    (page / "model.json").write_text(json.dumps(facts))
    tiny_model.photo(0).resize((40, 20)).save(tmp_path / "low.png")
    with browser.served(page) as url:
        chromium.open(url)
        chromium.wait(READY)
        chromium.choose(tmp_path / "low.png")
        chromium.wait(f"{FAULT} !== ''")
        assert chromium.evaluate(FAULT) == (
            "low.png: the picture is too small: 40 x 20 pixels, and the model takes a part of "
            "33 x 33."
        )


def test_transparent_pixels_are_mentioned(pages, chromium, tmp_path):
    picture = tiny_model.photo(0)
    picture.putalpha(100)
    picture.save(tmp_path / "glass.png")
    with browser.served(pages["classification"]) as url:
        chromium.open(url)
        chromium.wait(READY)
        chromium.choose(tmp_path / "glass.png")
        shown(chromium, 1)
        assert "are transparent" in chromium.tree("#list")


def remove(page: pathlib.Path, name: str) -> None:
    (page / "runtime" / name).unlink()


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (
            lambda page: (page / "model.onnx").unlink(),
            "model.onnx is missing in the folder of the page (404)",
        ),
        (
            lambda page: (page / "model.json").unlink(),
            "model.json is missing in the folder of the page (404)",
        ),
        (lambda page: (page / "model.json").write_text("{"), "model.json is damaged"),
        (lambda page: (page / "model.onnx").write_bytes(b"x"), "model.onnx cannot be opened"),
        (lambda page: remove(page, "ort.wasm.min.js"), "runtime/ort.wasm.min.js is missing"),
        (
            lambda page: remove(page, "ort-wasm-simd-threaded.js"),
            "runtime/ort-wasm-simd-threaded.js is missing",
        ),
        (
            lambda page: remove(page, "ort-wasm-simd-threaded.wasm"),
            "runtime/ort-wasm-simd-threaded.wasm is missing",
        ),
    ],
)
def test_a_damaged_folder_says_what_is_missing(damage, fault, page, chromium):
    damage(page)
    with browser.served(page) as url:
        chromium.open(url)
        chromium.wait(f"{FAULT} !== ''")
        assert fault in chromium.evaluate(FAULT)
        assert chromium.evaluate(STATUS) == ""
        assert chromium.evaluate("document.querySelector('#files').disabled")


def test_a_browser_without_simd_is_told_so(pages):
    # V8 has no SIMD on x86 processors without SSE 4.1.
    flag = "--js-flags=--no-enable-sse4-1"
    with browser.started(flag) as old, browser.served(pages["classification"]) as url:
        old.open(url)
        old.wait(f"{FAULT} !== ''")
        assert "this browser has no WebAssembly SIMD" in old.evaluate(FAULT)


def test_a_page_that_is_opened_as_a_file_says_how_to_serve_it(pages, chromium):
    chromium.open((pages["classification"] / "index.html").as_uri())
    chromium.wait(f"{FAULT} !== ''")
    assert "python -m http.server" in chromium.evaluate(FAULT)


# Keeps the camera's stream, to see afterwards whether it was freed.
KEEP_STREAM = """
const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
navigator.mediaDevices.getUserMedia = async (wanted) => (window.kept = await ask(wanted));
"""


@pytest.mark.parametrize("task", list(SPECS))
def test_the_camera_shows_one_frame_after_another_and_is_freed(task, pages, chromium):
    label = "document.querySelector('#live canvas')?.getAttribute('aria-label') ?? ''"
    with browser.served(pages[task]) as url:
        chromium.open(url, before=KEEP_STREAM)
        chromium.wait(READY)
        chromium.click("#camera")
        chromium.wait(f"({label}).startsWith('Camera: ')")
        first = "document.querySelector('#live canvas').toDataURL()"
        chromium.evaluate(f"void (window.first = {first})")
        chromium.wait(f"window.first !== {first}")
        assert "ms in the model" in chromium.tree("#live")
        chromium.click("#camera")
        chromium.wait(f"{STATUS} === 'The camera is off.'")
        assert chromium.evaluate("window.kept.getTracks().map((track) => track.readyState)") == [
            "ended"
        ]
        assert chromium.evaluate("document.querySelector('#live').hidden")


def test_a_camera_that_is_refused_is_explained(pages):
    with browser.started() as strict, browser.served(pages["classification"]) as url:
        refuse = (
            "navigator.mediaDevices.getUserMedia = async () => {throw new DOMException('', '%s')}"
        )
        for name, words in [
            ("NotAllowedError", "allow it for this page"),
            ("NotFoundError", "There is no camera"),
            ("NotReadableError", "close other programs"),
        ]:
            strict.open(url, before=refuse % name)
            strict.wait(READY)
            strict.click("#camera")
            strict.wait(f"{FAULT}.includes('{words}')")
        strict.open(url)  # Chromium itself, which has no camera here, or refuses it
        strict.wait(READY)
        strict.click("#camera")
        strict.wait(f"/camera/.test({FAULT})")
        assert strict.evaluate("document.querySelector('#camera').textContent") == (
            "Turn on the camera"
        )


def test_everything_is_reached_by_keyboard_and_has_a_name(pages, photos, chromium):
    with browser.served(pages["detection"]) as url:
        chromium.open(url)
        chromium.wait(READY)
        chromium.choose(photos[0])
        shown(chromium, 1)
        reached = []
        for _ in range(4):
            chromium.press("Tab")
            reached.append(chromium.evaluate("document.activeElement.id"))
            # The field of files is invisible: its label shows the focus.
            marked = "document.activeElement.id === 'files' ? drop : document.activeElement"
            assert chromium.evaluate(f"getComputedStyle({marked}).outlineStyle") == "solid"
        assert reached == ["files", "camera", "clear", "least"]
        chromium.press("ArrowLeft")
        assert chromium.evaluate("shown.textContent") == "25%"
        chromium.evaluate("document.querySelector('#clear').focus()")
        chromium.press("Enter")
        chromium.wait("document.querySelectorAll('#list li').length === 0")
        tree = chromium.tree()
    assert 'button "Drop photos here or choose photos"' in tree
    assert 'slider "Show boxes from a score of 25%"' in tree
    assert "status: All results are removed." in tree


def test_a_screen_reader_gets_the_result_as_text(pages, photos, chromium):
    with browser.served(pages["classification"]) as url:
        chromium.open(url)
        chromium.wait(READY)
        chromium.choose(photos[0])
        best = shown(chromium, 1)[photos[0].name][0]
        tree = chromium.tree()
    said = f"{best['name']} {best['share']:.1%}"
    assert f'status: "{photos[0].name}: {said}' in tree
    assert f'img "{photos[0].name}: {said}' in tree
    assert f'row "{said}"' in tree


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("task", list(SPECS))
def test_a_page_fits_a_phone_and_can_be_read(task, dark, pages, photos, chromium):
    long = photos[0].with_name(f"{'a_long_name_of_a_photo_' * 4}.png")
    shutil.copyfile(photos[0], long)
    with browser.served(pages[task]) as url:
        chromium.open(url, width=360, height=700, dark=dark)
        chromium.wait(READY)
        chromium.choose(*photos, long)
        shown(chromium, len(photos) + 1)
        assert chromium.evaluate("document.documentElement.scrollWidth") == 360
        low = chromium.evaluate(LOW_CONTRAST)
    assert low == []


# The texts whose contrast with what is behind them is below 4.5, WCAG 2.2's limit.
LOW_CONTRAST = """(() => {
  const numbers = (colour) => colour.match(/[0-9.]+/g).map(Number);
  const light = (colour) => {
    const [red, green, blue] = numbers(colour).map((value) =>
      value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4,
    );
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return numbers(colour)[3] === 0 ? behind(element.parentElement) : colour;
  };
  const contrast = (element) => {
    const [low, high] = [light(getComputedStyle(element).color), light(behind(element))].sort(
      (one, other) => one - other,
    );
    return (high + 0.05) / (low + 0.05);
  };
  const texts = [...document.body.querySelectorAll("*")].filter((element) =>
    [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()),
  );
  return texts.filter((element) => contrast(element) < 4.5).map((element) => element.outerHTML);
})()"""


# ---- The command ----


def export(cache: pathlib.Path, model: pathlib.Path, *arguments: str, **how: Any) -> str:
    """Runs the command; returns its error, or "" if it succeeds."""
    code, _, err = commands.run(
        cache, str(model), "--to=web", *arguments, module="mbv2_jax.export", **how
    )
    return err if code else ""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    return tiny_model.write(tmp_path_factory.mktemp("model") / "model")


def test_force_replaces_a_page_and_no_other_folder(model, onnxruntime_web, cache, tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "mine.txt").write_text("kept")
    arguments = [f"--output={tmp_path / 'page'}", f"--runtime={onnxruntime_web}"]
    error = export(cache, model, *arguments, "--force")
    assert "is a folder that --to=web did not write" in error
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["mine.txt"]
    shutil.rmtree(tmp_path / "page")
    assert export(cache, model, *arguments) == ""
    (tmp_path / "page" / "old.txt").touch()
    assert "exists" in export(cache, model, *arguments)
    assert export(cache, model, *arguments, "--force") == ""
    assert not (tmp_path / "page" / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--input=float32"], "--to=web takes --input=uint8 alone"),
        (["--batch=8"], "--to=web takes --batch=1 or dynamic, not 8"),
        (["--runtime=."], "--runtime=. lacks ort.wasm.min.mjs, "),
        (["--precision=int8"], "--to=web has no --precision=int8"),
        (["--layout=nchw"], "--layout has no meaning for --to=web"),
    ],
)
def test_the_command_refuses_in_one_line_and_leaves_nothing(
    arguments, fault, model, cache, tmp_path
):
    error = export(cache, model, f"--output={tmp_path / 'page'}", *arguments)
    assert fault in error.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_without_npm_the_flag_for_the_runtime_is_named(model, cache, tmp_path):
    env = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    error = export(cache, model, f"--output={tmp_path / 'page'}", env=env)
    assert "there is no npm: install Node.js, or give --runtime=DIR" in error.splitlines()[-1]
    assert not (tmp_path / "page").exists()


def test_an_npm_that_fails_is_quoted(model, cache, tmp_path):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code EAI_AGAIN' >&2\nexit 1\n")
    npm.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    error = export(cache, model, f"--output={tmp_path / 'page'}", env=env)
    assert "npm cannot download onnxruntime-web (npm error code EAI_AGAIN)" in error
    assert not (tmp_path / "page").exists()
    assert not list((tmp_path / "cache" / "mbv2_jax").iterdir())


def test_an_operation_that_the_page_lacks_is_refused():
    preprocessing = Preprocessing(33, "resize(40)|random_crop(33)")
    with pytest.raises(UserError, match=r"--to=web has no random_crop of 'resize"):
        web.operations(preprocessing)


def test_the_offline_page_has_every_file(pages):
    folder = pages["classification"]
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    listed = (folder / "offline.js").read_text().partition("FILES = [")[2].partition("]")[0]
    kept = set(json.loads(f"[{listed.strip().rstrip(',')}]"))
    # The page itself is "./"; the browser keeps the worker, and nobody loads the licence.
    assert kept == written - {"index.html", "offline.js", "runtime/LICENSE.txt"} | {"./"}


def test_every_server_knows_the_types_of_modules(pages):
    # Modules of another type than JavaScript's are not run, and nginx knows no .mjs.
    for page in pages.values():
        assert not list(page.rglob("*.mjs"))
