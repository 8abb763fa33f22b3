"""A program's jaxpr as an ONNX graph."""

from typing import Any

import jax
import jax.extend
import numpy as np

from mbv2_jax.errors import UserError
from mbv2_jax.export.onnx import operations
from mbv2_jax.export.onnx.graph import CHANNELS_FIRST, Graph, Tensor, Value
from mbv2_jax.export.program import Program

IMAGES = "images"  # the input
ANY = "N"  # the number of images, where it is open

# A program for any number of images is traced for this one: a prime, unlike the first axis of
# anything else but by chance.
_TRACED = 13

# The primitives that stand for a jaxpr, and the parameter that holds it. Loops hold one, too.
_CALLS = {"jit": "jaxpr", "custom_jvp_call": "call_jaxpr", "composite": "jaxpr"}


def graph_of(program: Program, nchw: bool) -> Graph:
    """Returns a program as a graph with the program's outputs.

    Args:
      program: to export.
      nchw: whether the images are (N, 3, H, W); they are (N, H, W, 3) otherwise.

    Raises:
      UserError: an operation has no counterpart, or the program mixes images, and their number is
        open.
    """
    batch = program.batch or _TRACED
    example = program.example(batch)
    order = CHANNELS_FIRST if nchw else (0, 1, 2, 3)
    images = Tensor(IMAGES, example.shape, program.dtype, order)
    graph = Graph(images, program.batch or ANY)
    walk = _Walk(graph, program)
    # At once, while pixels are a byte each: what follows are maps, (N, C, H, W).
    values = walk.run(program.jaxpr(batch), [graph.ordered(images, CHANNELS_FIRST)])
    # A dictionary's leaves are in the order of its keys.
    for name, value in zip(sorted(program.outputs()), values, strict=True):
        if program.batch is None and not isinstance(value, Tensor):
            raise UserError(
                f"{program.saved.path}: {name} do not depend on the images, and so they are for a "
                "fixed number of them: give --batch=1"
            )
        graph.output(name, value)
    return graph


class _Walk:
    """A walk over a program's operations, which adds them to a graph."""

    def __init__(self, graph: Graph, program: Program):
        self.graph, self.program = graph, program

    def run(
        self, closed: jax.extend.core.ClosedJaxpr, inputs: list[Value], scope: str = ""
    ) -> list[Value]:
        """Returns the results of a jaxpr, which belongs to a layer."""
        values: dict[Any, Value] = dict(zip(closed.jaxpr.invars, inputs, strict=True))
        for variable, constant in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            values[variable] = np.asarray(constant)

        def read(atom: Any) -> Value:
            if isinstance(atom, jax.extend.core.Literal):
                aval: Any = atom.aval
                return np.asarray(atom.val, aval.dtype)
            return values[atom]

        for equation in closed.jaxpr.eqns:
            results = self._results(equation, [read(atom) for atom in equation.invars], scope)
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in closed.jaxpr.outvars]

    def _results(self, equation: Any, inputs: list[Value], scope: str) -> list[Value]:
        """Returns the results of one operation."""
        name = primitive = equation.primitive.name
        self.graph.scope = scope = _layer(equation) or scope
        if primitive == "composite":
            name = equation.params["name"]
        operation = operations.OPERATIONS.get(name)
        if primitive in _CALLS and operation is None:
            return self.run(equation.params[_CALLS[primitive]], inputs, scope)
        if not any(isinstance(value, Tensor) for value in inputs):
            found = equation.primitive.bind(*inputs, **equation.params)
            results = found if equation.primitive.multiple_results else [found]
            return [np.asarray(result) for result in results]
        converted = operation and operation(self.graph, equation, *inputs)
        if not converted:
            raise UserError(
                f"{self.program.saved.path}: ONNX has no counterpart of {name} as it is used in "
                f"{scope or 'the program'}: export the model with --to=stablehlo"
            )
        return self._checked(converted if isinstance(converted, list) else [converted])

    def _checked(self, tensors: list[Tensor]) -> list[Value]:
        """Returns tensors; refuses those that are not for any number of images but should be."""
        for tensor in tensors:
            if self.program.batch is None and tensor.shape[:1] != (self.graph.batch,):
                raise UserError(
                    f"{self.program.saved.path}: {self.graph.scope or 'the program'} mixes images, "
                    "and so it is for a fixed number of them: give --batch=1"
                )
        return list(tensors)


def _layer(equation: Any) -> str:
    """Returns the layer that an operation belongs to, such as "layer4_1/depthwise"; "" for none."""
    scopes = str(equation.source_info.name_stack).split("/")
    # Layers have names in lower case; classes, and functions such as jit(relu), stand between them.
    return "/".join(scope for scope in scopes if scope[:1].islower() and "(" not in scope)
