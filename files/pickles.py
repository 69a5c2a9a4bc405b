"""Pickles of PyTorch networks and files of torch.save, read without executing what is in them.

A pickle is a program, and Python's reader calls whatever functions it names. Here a small machine
steps through it that imports nothing and knows no functions but those of `CALLS`, which stand for
what the pickles of EG3D call; any other is refused. It makes dicts, lists, tuples, strings and
numbers, `Inert` objects in place of instances, and `Stored` tensors, which stay in the mapped file
until `Stored.load`. Its work and memory are bounded by the file's size, whatever the file says;
those of torch.load are not, even with weights_only=True.
"""

import math
import mmap
import pickle
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_STEPS = 200_000  # Released files take some 30 000.
MAX_STORAGE_STEPS = 200  # In the small pickles before a tensor's numbers; torch takes some 50.
MAX_NAME = 500  # Letters in the name of a class or function, and in the key of a dict.
MAX_ARGUMENTS = 16  # In a call, and dimensions of a tensor.
STORAGE_MAGIC = 0x1950A86A20F9469CFC6C  # The first thing in torch.save's old format.
MAX_ZIP_END = 65_557  # Bytes of the end of a ZIP archive, comment and all.
DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
# Functions whose results have no use here, but may lie in the same file.
INERT = (
    "builtins.complex",
    "collections.Counter",
    "numpy.dtype",
    "torch.device",
    "torch.serialization._get_layout",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_tensor_v3",
)
NUMPY_SCALARS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}


class Global(NamedTuple):
    """The name of a class or function, which is never looked up."""

    name: str


class Inert:
    """What stands for an object: its class's name, `args`, `state` and items, as far as given."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple = (), state: Any = None) -> None:
        """Note what is known of the object."""
        self.name, self.args, self.state = name, args, state
        self.items: dict[str, Any] = {}


class Storage:
    """Numbers that torch.save wrote: how many, of which class, and where, once that is known."""

    __slots__ = ("count", "data", "name")

    def __init__(self, name: str, count: int) -> None:
        """Note what is known of the numbers."""
        self.name, self.count = name, count
        self.data: memoryview | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of the numbers, if a generator's file can need it."""
        return DTYPES.get(self.name)

    def itemsize(self) -> int:
        """Return the bytes of a number."""
        if self.dtype is None:
            raise ValueError(f"a tensor is of type {self.name!r}, which no such file needs")
        return self.dtype.itemsize

    def numbers(self) -> Tensor:
        """View the numbers in the file, [N]."""
        size = self.count * self.itemsize()
        if self.data is None or len(self.data) != size or size == 0:
            raise ValueError("a tensor's storage is empty or of another length than it says")
        return torch.frombuffer(self.data, dtype=self.dtype)


class Stored(NamedTuple):
    """A tensor that still lies in the file, as a view of a storage, or of a stream that holds one.

    Whatever a file says is in here, until `shape` and `load` have checked it.
    """

    storage: Storage | memoryview | str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def shape(self) -> tuple[int, ...]:
        """Return the size.

        Raises:
            ValueError: size and stride are none.
        """
        shapes = type(self.size) is type(self.stride) is tuple
        if not (shapes and len(self.size) == len(self.stride) <= MAX_ARGUMENTS):
            raise ValueError("a tensor's size and stride make no shape")
        if any(type(n) is not int or n < 0 for n in (self.offset, *self.size, *self.stride)):
            raise ValueError("a tensor's offset, size and stride must be whole numbers from 0")
        return self.size

    def load(self, expanded: bool = False) -> Tensor:
        """Copy the tensor out of the file; `expanded` ones have more elements than numbers.

        Raises:
            ValueError: the storage is damaged, or the tensor reaches beyond it.
        """
        count = math.prod(self.shape())
        if count == 0:
            raise ValueError("a tensor has no elements")
        storage = self.storage if type(self.storage) is Storage else read_storage(self.storage)
        numbers = storage.numbers()
        steps = list(zip(self.size, self.stride, strict=True))
        last = self.offset + sum((n - 1) * step for n, step in steps)
        if last >= len(numbers) or (count > len(numbers) and not expanded):
            raise ValueError(
                f"a tensor of size {list(self.size)}, stride {list(self.stride)} and offset "
                f"{self.offset} reaches beyond its storage of {len(numbers)} numbers"
            )
        stride = [step if n > 1 else 0 for n, step in steps]  # It can be anything for one element.
        view = numbers.as_strided(self.size, stride, self.offset)
        return view.clone(memory_format=torch.contiguous_format)


def to_numbers(array: np.ndarray) -> Any:
    """Return an array as (nested lists of) numbers; those of float32 as the shortest that is one.

    So a 1.7 in single precision is 1.7, not 1.7000000476837158, and becomes the same again.
    """
    if array.dtype.kind == "f" and array.itemsize < 8:
        array = array.astype(str).astype(float)
    return array.tolist()


def read_pickle(path: Path) -> Any:
    """Read what a pickle holds.

    Raises:
        ValueError: the file is no pickle, damaged, or not of the kind that this reader knows; the
            message is one line and names no file.
        OSError: it cannot be opened or mapped.
    """
    data = map_file(path)
    if data[:1] != pickle.PROTO:
        raise ValueError("it is no pickle")
    return Machine(data, MAX_STEPS).run()


def read_saved(path: Path) -> Any:
    """Read what a file of torch.save holds, in its format since version 1.6 or the one before.

    Raises:
        ValueError: as `read_pickle`; also if the file is compressed.
        OSError: it cannot be opened or mapped.
    """
    data = map_file(path)
    return read_archive(data) if data[:2] == b"PK" else read_stream(data, MAX_STEPS)


def map_file(path: Path) -> memoryview:
    """Return the bytes of a file, which are read when they are looked at."""
    with open(path, "rb") as file:
        # Writable, since torch warns of tensors that are not; the file stays as it is.
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


class Machine:
    """Reads pickles that follow each other in the data; `at` is where it stands."""

    def __init__(
        self, data: memoryview, steps: int, storages: dict[str, Storage] | None = None
    ) -> None:
        """Start at the beginning; `storages` collects what persistent ids refer to, if they may."""
        self.data, self.at = data, 0
        self.steps, self.storages = steps, storages
        self.stack: list[Any] = []
        self.stacks: list[list[Any]] = []  # Those below each mark.
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Read one pickle and return what it makes.

        Raises:
            ValueError: naming what is wrong with it.
        """
        self.stack, self.stacks, self.memo = [], [], {}
        try:
            while self.steps > 0:
                self.steps -= 1
                code = self.take(1).tobytes()
                if code == pickle.STOP:
                    return self.stack.pop()
                if code not in OPCODES:
                    raise ValueError(
                        f"opcode {code!r} at byte {self.at - 1} is none that such files have"
                    )
                OPCODES[code](self)
        except (IndexError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is damaged near byte {self.at}") from error
        raise ValueError("it takes too many steps")

    def take(self, count: int) -> memoryview:
        """Return the next bytes, without a copy."""
        if not 0 <= count <= len(self.data) - self.at:
            raise ValueError("it is cut short")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        """Take a number, `form` as in struct."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, length_form: str) -> str:
        """Take a string that follows its length."""
        return str(self.take(self.number(length_form)), "utf-8", "replace")

    def line(self) -> str:
        """Take a short line of text."""
        length = bytes(self.data[self.at : self.at + MAX_NAME]).find(b"\n")
        return str(self.take(length + 1)[:-1], "utf-8", "replace")

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def pop(self, count: int) -> list[Any]:
        """Take values off the stack, topmost last."""
        if count > len(self.stack):
            raise IndexError
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def pop_mark(self) -> list[Any]:
        """Take all values above the last mark off the stack."""
        values, self.stack = self.stack, self.stacks.pop()
        return values

    def mark(self) -> None:
        """Begin a new stack above the present one."""
        self.stacks.append(self.stack)
        self.stack = []

    def memoize(self, index: int) -> None:
        """Remember the top of the stack."""
        self.memo[index] = self.stack[-1]

    def append(self, values: list[Any]) -> None:
        """Add values to the list, or set, on top of the stack; other objects' are of no use."""
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(values)

    def set_items(self, values: list[Any]) -> None:
        """Add keys and values in turn to the dict on top of the stack; kept are those of names."""
        target = self.stack[-1]
        items = target.items if type(target) is Inert else target
        if len(values) % 2:
            raise IndexError
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Others may be hard to hash or compare, and generators have no use for them.
            if type(key) is str and len(key) <= MAX_NAME:
                items[key] = value

    def name(self, module: Any, name: Any) -> None:
        """Push the name of a class or function."""
        if type(module) is not str or type(name) is not str or len(module) + len(name) > MAX_NAME:
            raise ValueError("it names something by what is no name")
        module = "builtins" if module == "__builtin__" else module  # Its name in protocols 0 to 2.
        self.push(Global(f"{module}.{name}"))

    def call(self, function: Any, args: Any) -> None:
        """Push what stands for the result of a call."""
        if type(function) is not Global or type(args) is not tuple or len(args) > MAX_ARGUMENTS:
            raise ValueError("it calls what is no function")
        if function.name not in CALLS:
            raise ValueError(f"it calls {function.name!r}, which no such file needs")
        self.push(CALLS[function.name](*args))

    def instantiate(self, cls: Any, args: Any) -> None:
        """Push what stands for a new object."""
        if type(cls) is not Global:
            raise ValueError("it makes an instance of what is no class")
        self.push(Inert(cls.name, args))

    def build(self, state: Any) -> None:
        """Note the state of the object on top of the stack; that of dicts and lists is no use."""
        if type(self.stack[-1]) is Inert:
            self.stack[-1].state = state

    def refer(self, reference: Any) -> None:
        """Push the storage of a persistent id, ("storage", class, key, device, count).

        The old format also refers to modules' classes so, ("module", class, file, source text).
        """
        if self.storages is None:
            raise ValueError("it refers to data outside the pickle")
        if type(reference) is tuple and len(reference) == 4 and reference[0] == "module":
            self.push(reference[1])
            return
        # In the old format None follows, or what no version since 0.4 writes.
        known = type(reference) is tuple and reference[5:] in ((), (None,))
        if not known or len(reference) < 5 or reference[0] != "storage":
            raise ValueError("it refers to what is no storage")
        _, cls, key, _, count = reference[:5]
        if (type(cls), type(key), type(count)) != (Global, str, int) or len(key) > MAX_NAME:
            raise ValueError("a tensor's storage does not say what it holds")
        self.push(self.storages.setdefault(key, Storage(cls.name, count)))


# Sets become lists, since their elements may be hard to hash.
OPCODES: dict[bytes, Callable[[Machine], object]] = {
    pickle.PROTO: lambda m: m.take(1),
    pickle.FRAME: lambda m: m.take(8),
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT: lambda m: m.push(m.number("<i")),
    pickle.BININT1: lambda m: m.push(m.number("<B")),
    pickle.BININT2: lambda m: m.push(m.number("<H")),
    pickle.LONG1: lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),
    pickle.LONG4: lambda m: m.push(m.take(m.number("<i"))),  # Nobody needs the number.
    pickle.BINFLOAT: lambda m: m.push(m.number(">d")),
    pickle.SHORT_BINUNICODE: lambda m: m.push(m.text("<B")),
    pickle.BINUNICODE: lambda m: m.push(m.text("<I")),
    pickle.BINUNICODE8: lambda m: m.push(m.text("<Q")),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.number("<B"))),
    pickle.BINBYTES: lambda m: m.push(m.take(m.number("<I"))),
    pickle.BINBYTES8: lambda m: m.push(m.take(m.number("<Q"))),
    pickle.BYTEARRAY8: lambda m: m.push(m.take(m.number("<Q"))),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.EMPTY_SET: lambda m: m.push([]),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.TUPLE1: lambda m: m.push(tuple(m.pop(1))),
    pickle.TUPLE2: lambda m: m.push(tuple(m.pop(2))),
    pickle.TUPLE3: lambda m: m.push(tuple(m.pop(3))),
    pickle.TUPLE: lambda m: m.push(tuple(m.pop_mark())),
    pickle.FROZENSET: lambda m: m.push(m.pop_mark()),
    pickle.MARK: lambda m: m.mark(),
    pickle.POP: lambda m: m.pop(1),
    pickle.POP_MARK: lambda m: m.pop_mark(),
    pickle.APPEND: lambda m: m.append(m.pop(1)),
    pickle.APPENDS: lambda m: m.append(m.pop_mark()),
    pickle.ADDITEMS: lambda m: m.append(m.pop_mark()),
    pickle.SETITEM: lambda m: m.set_items(m.pop(2)),
    pickle.SETITEMS: lambda m: m.set_items(m.pop_mark()),
    pickle.MEMOIZE: lambda m: m.memoize(len(m.memo)),
    pickle.BINPUT: lambda m: m.memoize(m.number("<B")),
    pickle.LONG_BINPUT: lambda m: m.memoize(m.number("<I")),
    pickle.BINGET: lambda m: m.push(m.memo[m.number("<B")]),
    pickle.LONG_BINGET: lambda m: m.push(m.memo[m.number("<I")]),
    pickle.GLOBAL: lambda m: m.name(m.line(), m.line()),
    pickle.STACK_GLOBAL: lambda m: m.name(*m.pop(2)),
    pickle.REDUCE: lambda m: m.call(*m.pop(2)),
    pickle.NEWOBJ: lambda m: m.instantiate(*m.pop(2)),
    pickle.NEWOBJ_EX: lambda m: m.instantiate(*m.pop(3)[:2]),
    pickle.BUILD: lambda m: m.build(*m.pop(1)),
    pickle.BINPERSID: lambda m: m.refer(*m.pop(1)),
}


def _persistent_object(meta: dict) -> Inert:
    """Return an object of EG3D's code, which it carries along as source text: that stays text."""
    name = meta["class_name"]
    if type(name) is not str or len(name) > MAX_NAME:
        raise ValueError("it has an object whose class's name is no name")
    return Inert(name, state=meta["state"])


def _numpy_scalar(dtype: Inert, data: memoryview | str) -> float | int | bool | None:
    """Return a numpy scalar as a number, or None for what is none."""
    code, order = dtype.args[0], dtype.state[1]
    if type(code) is not str or code not in NUMPY_SCALARS or order not in ("<", ">", "|"):
        return None
    if len(data) != int(code[1]):
        raise ValueError(f"a numpy scalar of type {code} has {len(data)} bytes")
    data = data.encode("latin1") if type(data) is str else data
    return to_numbers(np.frombuffer(data, order + code))[0]


def _bytes_as_text(text: Any, encoding: Any) -> str:
    """Return bytes as protocol 2 writes them, whose codes are those of a string's letters."""
    if type(text) is not str or type(encoding) is not str or encoding != "latin1":
        raise ValueError("it has bytes in an unknown encoding")
    return text  # A copy for each call would be too many.


def _make_inert(name: str, *args: Any) -> Inert:
    """Return what stands for the result of a function of `INERT`."""
    return Inert(name, args)


def _tensor_with_attributes(function: Any, cls: Any, args: Any, state: Any) -> Stored:
    """Return a tensor that was given attributes, without them."""
    if function != Global("torch._utils._rebuild_tensor_v2") or type(args) is not tuple:
        raise ValueError("it has a tensor that is made in an unknown way")
    return Stored(*args[:4])


# What files may call, and what stands for the result.
CALLS: dict[str, Callable] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "torch.storage._load_from_bytes": lambda storage: storage,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "torch._utils._rebuild_tensor": lambda *args: Stored(*args),
    "torch._utils._rebuild_tensor_v2": lambda *args: Stored(*args[:4]),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch.Size": lambda size: size,
    "collections.OrderedDict": lambda *_: {},
    "builtins.set": lambda values=(): values,
    "builtins.frozenset": lambda values=(): values,
    "builtins.bytes": lambda: "",
    "builtins.bytearray": lambda data="", *_: data,
    "_codecs.encode": _bytes_as_text,
    "numpy.core.multiarray._reconstruct": lambda *args: Inert("numpy.ndarray", args),
    "numpy._core.multiarray._reconstruct": lambda *args: Inert("numpy.ndarray", args),
    "numpy.core.numeric._frombuffer": lambda *args: Inert("numpy.ndarray", args),
    "numpy._core.numeric._frombuffer": lambda *args: Inert("numpy.ndarray", args),
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
} | {name: partial(_make_inert, name) for name in INERT}


def read_storage(data: Any) -> Storage:
    """Read what torch.save writes for a lone storage, in its old format."""
    if type(data) is str:
        data = memoryview(bytearray(data, "latin1"))
    if type(data) is not memoryview:
        raise ValueError("a tensor has no storage")
    storage = read_stream(data, MAX_STORAGE_STEPS)
    if type(storage) is not Storage:
        raise ValueError("a tensor's storage does not say what it holds")
    return storage


def read_stream(data: memoryview, steps: int) -> Any:
    """Read torch.save's old format: five pickles, of which the fourth counts, then the numbers."""
    machine = Machine(data, steps, storages={})
    magic, _, system, content, keys = (machine.run() for _ in range(5))
    if not (
        magic == STORAGE_MAGIC and type(system) is dict and system.get("little_endian") is True
    ):
        raise ValueError("a tensor's storage is in another format than torch.save's")
    for key in keys if type(keys) is list else ():
        storage = machine.storages.get(key) if type(key) is str else None
        if storage is None:
            raise ValueError("it stores numbers that are no tensor's")
        storage.data = machine.take(machine.number("<q") * storage.itemsize())
    return content


def read_archive(data: memoryview) -> Any:
    """Read torch.save's format since version 1.6: a pickle and the numbers in a ZIP archive."""
    records = read_records(data)
    if "data.pkl" not in records or records.get("byteorder", b"little") != b"little":
        raise ValueError("it is in another format than torch.save's")
    machine = Machine(records["data.pkl"], MAX_STEPS, storages={})
    content = machine.run()
    for key, storage in machine.storages.items():
        storage.data = records.get(f"data/{key}")
    return content


def read_records(data: memoryview) -> dict[str, memoryview]:
    """Return what is in a ZIP archive, by name without the folder that all of it is in.

    Raises:
        ValueError: it is damaged, compressed, or beyond 4 GB.
    """
    end = max(0, len(data) - MAX_ZIP_END)
    end += bytes(data[end:]).rfind(b"PK\5\6")
    records = {}
    try:
        count, _, at, _ = struct.unpack_from("<HIIH", data, end + 10)
        for _ in range(count):
            magic, method, packed, size, *lengths, start = struct.unpack_from(
                "<4s6xH8xIIHHH8xI", data, at
            )
            name = str(data[at + 46 : at + 46 + lengths[0]], "utf-8", "replace")
            at += 46 + sum(lengths)
            # The lengths of name and extra field are those of the record's own header.
            start += 30 + sum(struct.unpack_from("<HH", data, start + 26))
            if magic != b"PK\1\2" or method != 0 or packed != size or start + size > len(data):
                raise ValueError("it is a damaged or compressed archive")
            records[name.partition("/")[2]] = data[start : start + size]
    except struct.error as error:
        raise ValueError("it is a damaged archive") from error
    return records
