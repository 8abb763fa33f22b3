"""Hostile configs of Keras models: nested, long, cyclic, or with values of other types."""

import json
from collections.abc import Callable, Iterator
from typing import Any

_MOST = 4 << 20  # the longest text that is parsed


def texts(config: Any) -> list[str]:
    """Returns JSON texts in place of a real model's config."""
    models: list[Any] = [*_graphs(), *(_changed(config, change) for change in _CHANGES)]
    return [
        "[" * 100_000 + "]" * 100_000,
        '{"config":' * 100_000 + "1" + "}" * 100_000,
        "[" + "[]," * (_MOST // 3 - 2) + "[]]",
        "[" + '{"":0},' * (_MOST // 7 - 2) + "[]]",
        "9" * 1_000_000,
        '"\\ud800"',
        "null",
        *map(json.dumps, models),
        json.dumps(config).replace("32", "1e400"),
        json.dumps(config).replace("32", "1" + "0" * 4000),
        json.dumps(config).replace("32", "NaN"),
    ]


def _layer(name: Any, *sources: str, kind: Any = "ReLU", **config: Any) -> dict[str, Any]:
    calls = [[[source, 0, 0, {}] for source in sources]] if sources else []
    return {"class_name": kind, "config": {"name": name} | config, "inbound_nodes": calls}


def _functional(layers: Any, output: str = "a") -> dict[str, Any]:
    ends = {"input_layers": [["in", 0, 0]], "output_layers": [[output, 0, 0]]}
    return {"class_name": "Functional", "config": {"name": "m", "layers": layers, **ends}}


def _graphs() -> Iterator[Any]:
    """Yields models whose connections are hostile."""
    start = _layer("in")
    yield _functional([start, _layer("a", "b"), _layer("b", "a")])
    yield _functional([start, _layer("a", "a")])
    yield _functional([start, _layer("a", "in"), _layer("a", "in")])
    yield _functional([start], output="z")
    yield _functional([_layer(str(index)) for index in range(30_000)])
    yield _nested(19)
    yield _nested(200)
    chain = [_layer(f"l{index}", f"l{index - 1}") for index in range(1, 1_900)]
    yield _functional([start, *reversed(chain), _layer("l0", "in"), _layer("a", "l1899")])
    # What is not ready yet is the last of many sources.
    wide = [_layer(f"l{n}", *["in"] * 120, f"l{n - 1}") for n in range(1, 1_500)]
    yield _functional([start, *reversed(wide), _layer("l0", "in"), _layer("a", "l1499")])
    yield _functional([start, _layer("a", *["in"] * 200_000)])
    yield _functional([start, {**_layer("a"), "inbound_nodes": [[["in", 0, 0, {}]]] * 200_000}])
    yield _functional([start, {**_layer("a"), "inbound_nodes": [[["in", 0, 1 << 70, {}]]]}])
    yield _functional([start, {**_layer("a"), "inbound_nodes": {"args": [[["in"]]]}}])
    args = _wrapped({"class_name": "__keras_tensor__", "config": {"keras_history": ["in", 0, 0]}})
    yield _functional([start, {**_layer("a"), "inbound_nodes": [{"args": [args]}]}])


def _wrapped(value: Any) -> Any:
    for _ in range(300):
        value = [value]
    return value


def _nested(depth: int) -> Any:
    """Returns a model in a model, and so on."""
    model: Any = _layer("a")
    for level in range(depth):
        model = {"class_name": "Sequential", "config": {"name": f"m{level}", "layers": [model]}}
    return model


# ---- Changes of a real config ----


def _changed(config: Any, change: Callable[[Any], None]) -> Any:
    """Returns a copy of a config whose layers were all changed."""
    config = json.loads(json.dumps(config))
    for layer in list(_layers(config)):
        change(layer)
    return config


def _layers(entry: Any) -> Iterator[Any]:
    yield entry
    for layer in entry["config"].get("layers", ()):
        yield from _layers(layer)


def _put(key: str, value: Any, kind: str = "") -> Callable[[Any], None]:
    """Returns a change of a setting, of every layer or of those of a class."""

    def change(layer: Any) -> None:
        if kind in ("", layer["class_name"]):
            layer["config"][key] = value

    return change


def _replace(key: str, value: Any) -> Callable[[Any], None]:
    """Returns a change of what is beside the settings of layers in models."""

    def change(layer: Any) -> None:
        if key in layer and "layers" not in layer["config"]:
            layer[key] = value

    return change


_CODE = ["4wEAAAAAAAAAAAAAAAEAAABTAAAA8wQAAAB0AGoB", None, None]  # marshalled
_LAMBDA = {"class_name": "Lambda", "config": {"name": "a", "function": _CODE}}
_CHANGES: list[Callable[[Any], None]] = [
    _put("name", ["a"]),
    _put("name", {"a": 1}),
    _put("name", "same"),
    _put("name", "two\nlines \x1b[31m", "Dense"),
    _put("name", "n" * 1_000_000, "Dense"),
    _put("layers", {"a": 1}),
    _put("layers", [None]),
    _put("layers", "abc"),
    _put("epsilon", "a"),
    _put("epsilon", 1e300, "BatchNormalization"),
    _put("epsilon", -1.0, "BatchNormalization"),
    _put("epsilon", float("nan"), "BatchNormalization"),
    _put("epsilon", float("inf"), "BatchNormalization"),
    _put("scale", float("inf"), "Rescaling"),
    _put("scale", 0, "Rescaling"),
    _put("scale", [1] * 100_000, "Rescaling"),
    _put("scale", _wrapped(1), "Rescaling"),
    _put("scale", "1", "Rescaling"),
    _put("scale", 10**400, "Rescaling"),
    _put("activation", _wrapped("relu"), "Dense"),
    _put("activation", {"class_name": {"a": 1}, "config": None}, "Dense"),
    _put("activation", "a\nb", "Dense"),
    _put("batch_shape", [None, 1e300, 1e300, 3]),
    _put("batch_shape", [None, "32", "32", 3]),
    _put("batch_shape", [None, 1 << 70, 1 << 70, 3]),
    _put("batch_shape", [None, -32, -32, 3]),
    _put("batch_shape", [None, True, True, 3]),
    _put("batch_shape", [None, 1 << 30, 1 << 30, 3]),
    _put("batch_input_shape", [None, [32], [32], 3]),
    _put("filters", 1 << 70),
    _put("strides", _wrapped(1)),
    _replace("class_name", ["Dense"]),
    _replace("class_name", 7),
    _replace("class_name", "A\nB"),
    _replace("class_name", "os.system"),
    _replace("config", None),
    _replace("config", []),
    _replace("inbound_nodes", 7),
    _replace("inbound_nodes", [[[[]]]]),
    lambda layer: layer.update(module="os", registered_name="os>system"),
    _put("function", _CODE),
    lambda layer: layer["class_name"] == "Rescaling" and layer.update(_LAMBDA),
]
