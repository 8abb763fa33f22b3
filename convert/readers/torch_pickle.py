"""The pickles inside files of torch.save, read without running or importing anything they name.

A pickle is a program for a small stack machine, of which two instructions are dangerous: one
imports a name, and one calls it. `Machine` is that machine with both replaced: a name stays a
`Name`, and a call gives a tensor where the name rebuilds one, a dict where it is one, and otherwise
`Made`, a note of the call that was not made. `pickletools`, of the standard library, takes the
instructions apart.
"""

import math
import pickletools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mbv2_jax.errors import UserError

# A network takes some 10,000 instructions. Each may create an object of 100 bytes, so that this
# many stay within a few hundred MB.
_MOST_INSTRUCTIONS = 2_000_000

# Elements of a view that repeats the numbers of its storage, as `expand` does.
_MOST_REPEATED = 1 << 20

# The types of elements by the names of torch's storages, without "Storage".
STORAGES: dict[str, Any] = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
    "ComplexFloat": np.complex64,
    "ComplexDouble": np.complex128,
    "QInt8": np.int8,
    "QUInt8": np.uint8,
    "QInt32": np.int32,
    "Untyped": np.uint8,
}

# The types of elements by torch's own names, for tensors in storages of bytes.
_DTYPES: dict[str, Any] = {
    **{f"uint{bits}": np.dtype(f"uint{bits}") for bits in (16, 32, 64)},
    **{
        name: getattr(ml_dtypes, name)
        for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    },
}

_MOST_AXES = 32  # of a tensor
_LARGEST = 1 << 48  # an axis, stride or offset: larger integers have products that take for ever

# What is unusual about the tensors that other functions of torch._utils rebuild.
_OTHER_TENSORS = {
    "_rebuild_qtensor": "is a quantized tensor",
    "_rebuild_sparse_tensor": "is a sparse tensor",
    "_rebuild_sparse_csr_tensor": "is a sparse tensor",
    "_rebuild_nested_tensor": "is a nested tensor",
    "_rebuild_meta_tensor_no_storage": "is a tensor without data",
    "_rebuild_wrapper_subclass": "is a tensor without data",
}

# Names of the standard library whose call cannot matter: they make plain values, or logs and
# options that training programs write beside the weights. mmengine pickles methods by `getattr`. A
# call of any other name of the standard library is refused: nothing would run here either, but such
# a file was made to run something.
_HARMLESS = {
    "argparse.Namespace",
    "builtins.bool",
    "builtins.bytearray",
    "builtins.bytes",
    "builtins.complex",
    "builtins.dict",
    "builtins.float",
    "builtins.frozenset",
    "builtins.getattr",
    "builtins.int",
    "builtins.list",
    "builtins.object",
    "builtins.range",
    "builtins.set",
    "builtins.slice",
    "builtins.str",
    "builtins.tuple",
    "builtins.type",
    "_codecs.encode",
    "copyreg._reconstructor",
    "copyreg.__newobj__",
    "functools.partial",
    "operator.attrgetter",
    "operator.itemgetter",
    "random.Random",
    "re._compile",
    "types.SimpleNamespace",
}
_HARMLESS_MODULES = ("collections", "datetime", "decimal", "enum", "fractions", "pathlib", "uuid")
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class Refused(UserError):
    """A pickle that would run code; the message is the name of what it would run."""


class Name(NamedTuple):
    """A name that a pickle would import."""

    module: str
    name: str

    def __str__(self) -> str:
        text = f"{self.module}.{self.name}"[:200]
        return text if text.isprintable() else repr(text)


class Made:
    """An object that a pickle would make by calling a name.

    Attributes:
      name: the name.
      state: the attributes that the pickle sets, mostly a dict.
    """

    __slots__ = ("name", "state")

    def __init__(self, name: Name):
        self.name = name
        self.state: Any = None


class Tensor:
    """A tensor.

    Attributes:
      fault: why it is no plain array, such as "is a quantized tensor"; "" for a plain one.
      size: of each axis.
    """

    __slots__ = ("_offset", "_storage", "_stride", "fault", "size")

    def __init__(
        self,
        storage: "Storage | None" = None,
        offset: int = 0,
        size: tuple[int, ...] = (),
        stride: tuple[int, ...] = (),
        fault: str = "",
    ):
        self._storage = storage
        self._offset = offset
        self._stride = stride
        self.size = size
        self.fault = fault

    def array(self) -> np.ndarray:
        """Returns the numbers of a plain one, a read-only view of its storage.

        Raises:
          Exception: the storage is damaged.
        """
        assert self._storage is not None
        dtype = self._storage.dtype
        if not math.prod(self.size):
            return np.empty(self.size, dtype)
        numbers = self._storage.array()[self._offset :]
        strides = tuple(step * dtype.itemsize for step in self._stride)
        return np.lib.stride_tricks.as_strided(numbers, self.size, strides, writeable=False)


class Storage:
    """The numbers of some tensors, one after another.

    Attributes:
      dtype: of the numbers.
      count: how many there are.
    """

    __slots__ = ("_array", "_read", "count", "dtype")

    def __init__(self, dtype: Any, count: int, read: Callable[[], np.ndarray]):
        self.dtype = np.dtype(dtype)
        self.count = count
        self._read = read
        self._array: np.ndarray | None = None

    def array(self) -> np.ndarray:
        """Returns the numbers, (count,); reads them at the first call."""
        if self._array is None:
            self._array = self._read()
        return self._array


class _Mark:
    """The place on the stack where the elements of a collection begin."""


_MARK = _Mark()


class Machine:
    """A stack machine that reads one pickle.

    Args:
      persistent: returns the object with a persistent id, a `Storage`.
    """

    def __init__(self, persistent: Callable[[Any], Any]):
        self._persistent = persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self, content: Any) -> Any:
        """Returns the object in a pickle.

        Args:
          content: bytes, or an open file, which is left after the pickle.

        Raises:
          Refused: it would run code.
          Exception: it is damaged; the type of error depends on the damage.
        """
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if count == _MOST_INSTRUCTIONS:
                raise ValueError(f"a pickle of more than {_MOST_INSTRUCTIONS:,} instructions")
            step = _STEPS.get(opcode.name)
            if step is not None:
                step(self, argument)
            elif opcode.name in _CONSTANTS:
                self._stack.append(argument)
            else:
                raise ValueError(f"instruction {opcode.name}, which torch.save does not write")
        return self._stack.pop()

    # The instructions. Their names are those of `pickletools`, their meaning is told there.

    def _pop_to_mark(self) -> list[Any]:
        place = len(self._stack) - 1
        while self._stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("a collection that has no beginning")
        values = self._stack[place + 1 :]
        del self._stack[place:]
        return values

    def _put(self, place: int | None) -> None:
        self._memo[len(self._memo) if place is None else place] = self._stack[-1]

    def _get(self, place: int) -> None:
        self._stack.append(self._memo[place])

    def _tuple(self, size: int) -> None:
        values = tuple(self._stack[len(self._stack) - size :])
        if len(values) < size:
            raise ValueError("a tuple of more values than there are")
        del self._stack[len(self._stack) - size :]
        self._stack.append(values)

    def _dict(self, values: list[Any]) -> None:
        self._stack.append({})
        self._set_items(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if len(values) % 2:
            raise ValueError("a dictionary with a key and no value")
        if isinstance(target, dict):
            for key, value in zip(values[::2], values[1::2], strict=True):
                # Keys of another kind name no weights, and hashing them could take for ever.
                if isinstance(key, str | int | float | None):
                    target[str(key)] = value
        elif not isinstance(target, Made):
            raise ValueError("items for something that is no dictionary")

    def _append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Made):
            raise ValueError("values for something that is no list")

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name that is no text")
        self._name(f"{module} {name}")

    def _name(self, both: str) -> None:
        module, _, name = both.partition(" ")
        self._stack.append(Name(_PYTHON_2.get(module, module), name))

    def _call(self, keywords: bool = False) -> None:
        if keywords:
            self._stack.pop()
        arguments, called = self._stack.pop(), self._stack.pop()
        self._stack.append(call(called, arguments))

    def _call_marked(self) -> None:
        called, *arguments = self._pop_to_mark()
        self._stack.append(call(called, tuple(arguments)))

    def _instance(self, both: str) -> None:
        arguments = tuple(self._pop_to_mark())
        self._name(both)
        self._stack.append(call(self._stack.pop(), arguments))

    def _build(self) -> None:
        state = self._stack.pop()
        if isinstance(self._stack[-1], Made):
            self._stack[-1].state = state

    def _persistent_id(self) -> None:
        self._stack.append(self._persistent(self._stack.pop()))


def call(called: Any, arguments: Any) -> Any:
    """Returns the result of a call that a pickle asks for, without making it.

    Raises:
      Refused: the name is one of the standard library's that runs or changes something.
    """
    if not isinstance(called, Name) or not isinstance(arguments, tuple):
        raise Refused(str(called.name) if isinstance(called, Made) else "an object that it makes")
    if called in _REBUILD:
        return _REBUILD[called](*arguments)
    if called.module in ("torch._utils", "torch._tensor") and called.name in _OTHER_TENSORS:
        return Tensor(fault=_OTHER_TENSORS[called.name])
    top = called.module.partition(".")[0]
    standard = top in sys.stdlib_module_names or top == "nt"
    if standard and str(called) not in _HARMLESS and top not in _HARMLESS_MODULES:
        raise Refused(str(called))
    if str(called) in ("copyreg._reconstructor", "copyreg.__newobj__") and arguments:
        return Made(arguments[0] if isinstance(arguments[0], Name) else called)
    return Made(called)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """Returns a view of a storage; torch's _rebuild_tensor and _rebuild_tensor_v2."""
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    size, stride = tuple(size), tuple(stride)
    if not len(size) == len(stride) <= _MOST_AXES:
        raise ValueError(f"a tensor of {len(size)} axes and {len(stride)} strides")
    # The values may be anything, tuples that contain one another without end, too: print none.
    if not all(type(n) is int and 0 <= n < _LARGEST for n in (offset, *size, *stride)):
        raise ValueError("a tensor whose size, stride or offset is impossible")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and last >= storage.count:
        raise ValueError(f"a tensor of size {size} in a storage of {storage.count} numbers")
    if count > max(storage.count, _MOST_REPEATED):
        raise ValueError(f"a tensor of size {size} that repeats {storage.count} numbers")
    fault = "is a tensor of complex numbers" if storage.dtype.kind == "c" else ""
    return Tensor(storage, offset, size, stride, fault)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    """Returns a view of a storage of bytes, whose type of element stands beside it."""
    del grad, hooks
    if not isinstance(storage, Storage) or not isinstance(dtype, Name):
        raise ValueError("a tensor without a storage or a type")
    if dtype.name not in _DTYPES:
        return Tensor(fault=f"is a tensor of {dtype}")
    kind = np.dtype(_DTYPES[dtype.name])
    typed = Storage(
        kind, storage.count // kind.itemsize, lambda: storage.array().view(np.uint8).view(kind)
    )
    return _rebuild_tensor(typed, offset, size, stride)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Returns a tensor of a subclass, or with attributes, as a plain one."""
    del kind, state
    return call(function, arguments)


def _dictionary(*_: Any) -> dict[str, Any]:
    return {}


def _ordered_dictionary(items: Any = ()) -> dict[str, Any]:
    """Returns a dict of the items in the call, which only Python 2 writes there."""
    if not isinstance(items, list):
        return {}
    found = {key: value for key, value in items if isinstance(key, str)}
    items.clear()  # the same list in 100,000 calls would fill the memory
    return found


def _set(values: Any = ()) -> Any:
    """Returns the elements of a set, whose hashes could take for ever; copies could, too."""
    return values if isinstance(values, list | tuple) else []


_REBUILD: dict[Name, Callable[..., Any]] = {
    Name("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    Name("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    Name("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    Name("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    Name("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    Name("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    Name("collections", "OrderedDict"): _ordered_dictionary,
    Name("collections", "defaultdict"): _dictionary,
    Name("builtins", "dict"): _dictionary,
    Name("builtins", "set"): _set,
    Name("builtins", "frozenset"): _set,
}

# Instructions whose argument is the value that they push.
_CONSTANTS = frozenset(
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.arg is not None and opcode.stack_after and not opcode.stack_before
    # of the memo, names and extensions
) - {"GET", "BINGET", "LONG_BINGET", "GLOBAL", "PERSID", "EXT1", "EXT2", "EXT4"}

_STEPS: dict[str, Callable[[Machine, Any], object]] = {
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "STOP": lambda m, _: None,
    "NONE": lambda m, _: m._stack.append(None),
    "NEWTRUE": lambda m, _: m._stack.append(True),
    "NEWFALSE": lambda m, _: m._stack.append(False),
    "MARK": lambda m, _: m._stack.append(_MARK),
    "POP": lambda m, _: m._stack.pop(),
    "POP_MARK": lambda m, _: m._pop_to_mark(),
    "DUP": lambda m, _: m._stack.append(m._stack[-1]),
    "PUT": Machine._put,
    "BINPUT": Machine._put,
    "LONG_BINPUT": Machine._put,
    "MEMOIZE": Machine._put,
    "GET": Machine._get,
    "BINGET": Machine._get,
    "LONG_BINGET": Machine._get,
    "EMPTY_TUPLE": lambda m, _: m._tuple(0),
    "TUPLE1": lambda m, _: m._tuple(1),
    "TUPLE2": lambda m, _: m._tuple(2),
    "TUPLE3": lambda m, _: m._tuple(3),
    "TUPLE": lambda m, _: m._stack.append(tuple(m._pop_to_mark())),
    "EMPTY_LIST": lambda m, _: m._stack.append([]),
    "LIST": lambda m, _: m._stack.append(m._pop_to_mark()),
    "APPEND": lambda m, _: m._append([m._stack.pop()]),
    "APPENDS": lambda m, _: m._append(m._pop_to_mark()),
    "EMPTY_DICT": lambda m, _: m._stack.append({}),
    "DICT": lambda m, _: m._dict(m._pop_to_mark()),
    "SETITEM": lambda m, _: m._set_items([m._stack.pop() for _ in range(2)][::-1]),
    "SETITEMS": lambda m, _: m._set_items(m._pop_to_mark()),
    "EMPTY_SET": lambda m, _: m._stack.append([]),
    "ADDITEMS": lambda m, _: m._append(m._pop_to_mark()),
    "FROZENSET": lambda m, _: m._stack.append(m._pop_to_mark()),
    "GLOBAL": Machine._name,
    "STACK_GLOBAL": lambda m, _: m._stack_global(),
    "REDUCE": lambda m, _: m._call(),
    "NEWOBJ": lambda m, _: m._call(),
    "NEWOBJ_EX": lambda m, _: m._call(keywords=True),
    "INST": Machine._instance,
    "OBJ": lambda m, _: m._call_marked(),
    "BUILD": lambda m, _: m._build(),
    "BINPERSID": lambda m, _: m._persistent_id(),
}
