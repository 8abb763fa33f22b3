"""TensorFlow's GraphDef, written by the protobuf library, for the tests of frozen graphs."""

from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

# The parts of tensorflow/core/framework/{graph,node_def,attr_value,tensor,tensor_shape}.proto that
# a frozen graph of these tests needs. TYPE_MESSAGE is 11, LABEL_REPEATED 3.
_SCHEMA = """
name: "graph.proto" package: "tensorflow" syntax: "proto3"
message_type { name: "GraphDef"
  field { name: "node" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".tensorflow.NodeDef" } }
message_type { name: "NodeDef"
  field { name: "name" number: 1 type: TYPE_STRING }
  field { name: "op" number: 2 type: TYPE_STRING }
  field { name: "input" number: 3 label: LABEL_REPEATED type: TYPE_STRING }
  field { name: "attr" number: 5 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".tensorflow.NodeDef.AttrEntry" }
  nested_type { name: "AttrEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type: TYPE_MESSAGE type_name: ".tensorflow.AttrValue" } } }
message_type { name: "AttrValue"
  field { name: "list" number: 1 type: TYPE_MESSAGE type_name: ".tensorflow.ListValue" }
  field { name: "s" number: 2 type: TYPE_BYTES }
  field { name: "f" number: 4 type: TYPE_FLOAT }
  field { name: "type" number: 6 type: TYPE_INT32 }
  field { name: "shape" number: 7 type: TYPE_MESSAGE type_name: ".tensorflow.TensorShapeProto" }
  field { name: "tensor" number: 8 type: TYPE_MESSAGE type_name: ".tensorflow.TensorProto" } }
message_type { name: "ListValue"
  field { name: "i" number: 3 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "TensorProto"
  field { name: "dtype" number: 1 type: TYPE_INT32 }
  field { name: "tensor_shape" number: 2 type: TYPE_MESSAGE
    type_name: ".tensorflow.TensorShapeProto" }
  field { name: "tensor_content" number: 4 type: TYPE_BYTES }
  field { name: "float_val" number: 5 label: LABEL_REPEATED type: TYPE_FLOAT }
  field { name: "int_val" number: 7 label: LABEL_REPEATED type: TYPE_INT32 }
  field { name: "half_val" number: 13 label: LABEL_REPEATED type: TYPE_INT32 } }
message_type { name: "TensorShapeProto"
  field { name: "dim" number: 2 label: LABEL_REPEATED type: TYPE_MESSAGE
    type_name: ".tensorflow.Dim" } }
message_type { name: "Dim" field { name: "size" number: 1 type: TYPE_INT64 } }
"""
_TYPES = {np.dtype(np.float32): 1, np.dtype(np.int32): 3, np.dtype(np.float16): 19}


class GraphDef:
    """A graph to which nodes are added; `content()` is the file."""

    def __init__(self) -> None:
        pool = descriptor_pool.DescriptorPool()
        pool.Add(text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto()))
        kind = pool.FindMessageTypeByName("tensorflow.GraphDef")
        self._graph = message_factory.GetMessageClass(kind)()

    def node(
        self, name: str, op: str, *inputs: str, **attributes: list[int] | bytes | float
    ) -> Any:
        """Adds a node, with attributes that are lists of integers, strings or numbers."""
        node = self._graph.node.add(name=name, op=op, input=inputs)
        for key, value in attributes.items():
            if isinstance(value, list):
                node.attr[key].list.i.extend(value)
            elif isinstance(value, bytes):
                node.attr[key].s = value
            else:
                node.attr[key].f = value
        return node

    def placeholder(self, name: str, *shape: int) -> None:
        dims = self.node(name, "Placeholder").attr["shape"].shape.dim
        for size in shape:
            dims.add(size=size)

    def constant(self, name: str, array: np.ndarray, field: str = "tensor_content") -> None:
        """Adds a constant; `field` holds its numbers, or one if the array repeats that."""
        tensor = self.node(name, "Const").attr["value"].tensor
        tensor.dtype = _TYPES[array.dtype]
        for size in array.shape:
            tensor.tensor_shape.dim.add(size=size)
        if field == "tensor_content":
            tensor.tensor_content = array.tobytes()
            return
        values = array.ravel() if any(array.strides) else array.flat[:1]
        if field == "half_val":
            values = values.view(np.uint16)
        getattr(tensor, field).extend(values.tolist())

    def content(self) -> bytes:
        return self._graph.SerializeToString()
