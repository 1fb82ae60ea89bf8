"""Read what a checkpoint's pickle claims, without making anything of it.

`torch.load(weights_only=True)` executes nothing foreign, but takes memory and time as the file asks: in torch 2.15 a
dictionary key of nested tuples ends the interpreter or never returns, `bytearray(10**12)` is made, and a tensor of two
numbers may count 10^12. Here the same instructions are followed with stand-ins: names must be on a list of about
twenty, sizes must lie within the file, and only then is the file handed to torch.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BufferedIOBase
from math import prod
from typing import Any

MAX_INSTRUCTIONS = 250_000  # a ResNet-50 with heads and momentum has 16,000
MAX_TEXT = 1 << 20  # bytes of one string
MAX_NAME = 256  # bytes of the module or the name of a function
MAX_DIMENSIONS = 8

ITEM_SIZES = {
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    "torch.LongStorage": 8,
    "torch.IntStorage": 4,
    "torch.ShortStorage": 2,
    "torch.CharStorage": 1,
    "torch.ByteStorage": 1,
    "torch.BoolStorage": 1,
}
# What authors' files hold besides tensors and plain values. A `Discarded` is made in place of each: neither argparse's
# nor numpy's code runs. The last two are a function among the options of VICReg's and Barlow Twins' LARS.
DISCARDED = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "__main__.exclude_bias_and_norm",
    "__mp_main__.exclude_bias_and_norm",
)


class Discarded:
    """Stands in for what a checkpoint holds besides tensors and plain values: made from anything, keeps nothing."""

    def __new__(cls, *args: Any) -> "Discarded":
        """Take any arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Take any state."""


class UnsafeFileError(ValueError):
    """A file claims what no checkpoint needs; the message completes "got a file that ..."."""


@dataclass(frozen=True)
class Name:
    """A function or class that the pickle refers to."""

    path: str


@dataclass(frozen=True)
class Storage:
    """Numbers in the file that tensors are views of."""

    key: str
    item_size: int
    numel: int


@dataclass(frozen=True)
class TensorClaim:
    """A tensor that the pickle would make."""

    num_bytes: int


class OrderedClaim(dict[Any, Any]):
    """An OrderedDict that the pickle would make."""


@dataclass
class Claims:
    """What a pickle would make, and the bytes it would take.

    Attributes:
        value: Plain values, dictionaries, lists and tuples as they are, with claims in place of all else.
        storages: Numbers in the file, by key.
        tensor_bytes: Sum over the tensors, those that share numbers counted each.
    """

    value: Any = None
    storages: dict[str, Storage] = field(default_factory=dict)
    tensor_bytes: int = 0


def read_claims(file: BufferedIOBase, available: int, *, legacy: bool = False) -> Claims:
    """Follow one pickle from the position of a file, and leave the file behind it.

    Args:
        file: Holds the pickle; nothing else of it is read.
        available: Bytes that the numbers of the whole file may take.
        legacy: Whether storages are named as in the format before torch 1.6.

    Raises:
        UnsafeFileError: If the pickle refers to what is not on the list, calls something else than a maker of tensors,
            claims more bytes than there are, or is malformed.
    """
    scan = _Scan(file, available, legacy)
    try:
        scan.claims.value = scan.run()
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error, MemoryError) as error:
        if isinstance(error, UnsafeFileError):
            raise
        raise UnsafeFileError("is damaged: its pickle breaks off or contradicts itself") from error
    return scan.claims


class _Scan:
    """The machine that a pickle is a program for, with the instructions that torch's restricted reader knows."""

    def __init__(self, file: BufferedIOBase, available: int, legacy: bool) -> None:
        self.file, self.available, self.legacy = file, available, legacy
        self.claims = Claims()
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MAX_INSTRUCTIONS):
            code = self._read(1)
            if code == b".":
                return self.stack.pop()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise UnsafeFileError(f"uses instruction {code!r} of pickle, which no checkpoint of torch's has")
            instruction(self)
        raise UnsafeFileError(f"has more than {MAX_INSTRUCTIONS:,} instructions in its pickle")

    def _read(self, count: int) -> bytes:
        if count > MAX_TEXT:
            raise UnsafeFileError(f"holds a text of {count:,} bytes")
        content = self.file.read(count)
        if len(content) < count:
            raise UnsafeFileError("is damaged: its pickle breaks off")
        return content

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._read(struct.calcsize(form)))[0]

    def protocol(self) -> None:
        version = self._number("B")
        if version != 2:
            raise UnsafeFileError(f"uses protocol {version} of pickle, where torch.save writes 2")

    def name(self) -> None:
        module, name = (self.file.readline(MAX_NAME) for _ in range(2))
        if not (module.endswith(b"\n") and name.endswith(b"\n")):
            raise UnsafeFileError("is damaged: its pickle holds a name without an end")
        path = f"{module[:-1].decode()}.{name[:-1].decode()}"
        if path not in _CALLS and path not in ITEM_SIZES and path not in DISCARDED:
            raise UnsafeFileError(f"refers to {path!r}, which is neither a tensor nor a plain value")
        self.stack.append(Name(path))

    def text(self) -> None:
        self.stack.append(str(self._read(self._number("<I")), "utf-8", "surrogatepass"))

    def short_text(self) -> None:
        self.stack.append(self._read(self._number("B")).decode())

    def long_integer(self) -> None:
        self.stack.append(int.from_bytes(self._read(self._number("B")), "little", signed=True))

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def tuple_since_mark(self) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedClaim) or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A tuple would be hashed by recursion, deep enough for a crash; chosen integers would all collide.
            if not (type(key) is str or (type(key) is int and 0 <= key < 2**61 - 1)):
                raise UnsafeFileError("has a dictionary whose keys are neither texts nor counts")
            target[key] = value

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def remember(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def recall(self, place: int) -> None:
        self.stack.append(self.memo[place])

    def new_object(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, Name) or kind.path not in DISCARDED or type(arguments) is not tuple:
            raise UnsafeFileError(f"makes an object of {_described(kind)}")
        self.stack.append(Discarded())

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple:
            raise TypeError
        if isinstance(function, Name) and function.path in DISCARDED:
            self.stack.append(Discarded())
        elif isinstance(function, Name) and function.path in _CALLS:
            self.stack.append(_CALLS[function.path](self, *arguments))
        else:
            raise UnsafeFileError(f"calls {_described(function)}")

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        is_metadata = type(target) is OrderedClaim and type(state) is dict and set(state) <= {"_metadata"}
        if not (is_metadata or type(target) is Discarded):
            raise UnsafeFileError("gives a state to an object that has none")

    def storage(self) -> None:
        claim = self.stack.pop()
        word, kind, key, _, numel, *view = claim
        if word != "storage" or type(key) is not str or type(numel) is not int or numel < 0:
            raise TypeError
        if view != [None] * self.legacy:
            raise UnsafeFileError("holds views of storages, which torch.save no longer writes")
        storage = Storage(key, ITEM_SIZES[kind.path], numel)
        known = self.claims.storages.setdefault(key, storage)
        if known != storage:
            raise UnsafeFileError(f"contradicts itself about the size of storage {key[:20]!r}")
        if storage.item_size * numel > self.available:
            raise UnsafeFileError(f"claims {storage.item_size * numel:,} bytes where it has {self.available:,}")
        self.stack.append(storage)

    def tensor(
        self,
        storage: Storage,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool = False,
        hooks: Any = None,
    ) -> TensorClaim:
        if type(storage) is not Storage or type(size) is not tuple or type(stride) is not tuple:
            raise TypeError
        counts = (offset, *size, *stride)
        if len(size) != len(stride) or len(size) > MAX_DIMENSIONS or any(type(c) is not int or c < 0 for c in counts):
            raise UnsafeFileError("holds a tensor without a proper shape")
        _check_flags(requires_grad, hooks)
        numel = prod(size)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if numel > storage.numel or (numel and last >= storage.numel) or max(counts) >= 2**62:
            raise UnsafeFileError(f"holds a tensor of {numel:,} numbers where {storage.numel:,} are stored")
        self.claims.tensor_bytes += numel * storage.item_size
        return TensorClaim(numel * storage.item_size)

    def parameter(self, data: TensorClaim, requires_grad: bool, hooks: Any) -> TensorClaim:
        if type(data) is not TensorClaim:
            raise TypeError
        _check_flags(requires_grad, hooks)
        return data

    def ordered(self) -> OrderedClaim:
        return OrderedClaim()

    def encoded(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise UnsafeFileError(f"asks for the encoding {encoding!r:.20}")
        return text.encode("latin1")


def _check_flags(requires_grad: Any, hooks: Any) -> None:
    if type(requires_grad) is not bool or not (hooks is None or (type(hooks) is OrderedClaim and not hooks)):
        raise UnsafeFileError("holds a tensor with hooks")


def _described(value: Any) -> str:
    return repr(value.path) if isinstance(value, Name) else f"a {type(value).__name__}"


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _Scan.ordered,
    "torch._utils._rebuild_tensor": _Scan.tensor,
    "torch._utils._rebuild_tensor_v2": _Scan.tensor,
    "torch._utils._rebuild_parameter": _Scan.parameter,
    "_codecs.encode": _Scan.encoded,
}
_INSTRUCTIONS: dict[bytes, Callable[[_Scan], None]] = {
    b"\x80": _Scan.protocol,
    b"c": _Scan.name,
    b"X": _Scan.text,
    b"U": _Scan.short_text,
    b"\x8a": _Scan.long_integer,
    b"J": lambda scan: scan.stack.append(scan._number("<i")),
    b"K": lambda scan: scan.stack.append(scan._number("B")),
    b"M": lambda scan: scan.stack.append(scan._number("<H")),
    b"G": lambda scan: scan.stack.append(scan._number(">d")),
    b"N": lambda scan: scan.stack.append(None),
    b"\x88": lambda scan: scan.stack.append(True),
    b"\x89": lambda scan: scan.stack.append(False),
    b")": lambda scan: scan.stack.append(()),
    b"]": lambda scan: scan.stack.append([]),
    b"}": lambda scan: scan.stack.append({}),
    b"(": _Scan.mark,
    b"t": _Scan.tuple_since_mark,
    b"\x85": lambda scan: scan.tuple_of(1),
    b"\x86": lambda scan: scan.tuple_of(2),
    b"\x87": lambda scan: scan.tuple_of(3),
    b"a": lambda scan: scan.append([scan.stack.pop()]),
    b"e": lambda scan: scan.append(scan.since_mark()),
    b"s": _Scan.set_item,
    b"u": lambda scan: scan.set_items(scan.since_mark()),
    b"q": lambda scan: scan.remember(scan._number("B")),
    b"r": lambda scan: scan.remember(scan._number("<I")),
    b"h": lambda scan: scan.recall(scan._number("B")),
    b"j": lambda scan: scan.recall(scan._number("<I")),
    b"\x81": _Scan.new_object,
    b"R": _Scan.call,
    b"b": _Scan.build,
    b"Q": _Scan.storage,
}
