"""Files that attack whoever opens them: each is refused for a reason of its own."""

import io
import json
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save

LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."
TERA = 10**12


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    """Any integer, as LONG1."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(module: str, attribute: str) -> bytes:
    return b"c" + f"{module}\n{attribute}\n".encode()


def group(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + group(*arguments) + b"R"


def storage(numel: int, *, key: str = "0", kind: str = "FloatStorage", view: bytes = b"") -> bytes:
    return group(text("storage"), name("torch", kind), text(key), text("cpu"), number(numel), view) + b"Q"


def tensor(stored: int, size: list[int], stride: list[int], *, offset: int = 0, view: bytes = b"") -> bytes:
    shape, steps = (group(*map(number, values)) for values in (size, stride))
    hooks = call("collections", "OrderedDict")
    return call(
        "torch._utils", "_rebuild_tensor_v2", storage(stored, view=view), number(offset), shape, steps, b"\x89", hooks
    )


def mapping(value: bytes, key: bytes | None = None) -> bytes:
    """A whole pickle: a dictionary with one entry."""
    return b"\x80\x02}" + (text("encoder.weight") if key is None else key) + value + b"s."


def archive(data: bytes, entries: Mapping[str, bytes] | None = None, *, method: int = zipfile.ZIP_STORED) -> bytes:
    """What torch.save writes around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as writer:
        for entry, content in {"data.pkl": data, "version": b"3\n", **(entries or {})}.items():
            writer.writestr(f"archive/{entry}", content)
    return file.getvalue()


def legacy(data: bytes, keys: bytes = b"\x80\x02].", storages: bytes = b"") -> bytes:
    return LEGACY_START + data + keys + storages


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def small(dtype: str = "F32", shape: list[int] | None = None, offsets: list[int] | None = None) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape or [2], "data_offsets": offsets or [0, 8]}}


def executing(canary: str) -> dict[str, bytes]:
    """Pickles that run something when they are loaded by pickle, and by torch without its restriction."""
    command = text(f"touch {canary}")
    code = text(f"__import__('pathlib').Path({canary!r}).touch()")
    system = call("posix", "system", command)
    return {
        "os.system": call("os", "system", command),
        "posix.system": system,
        "eval": call("builtins", "eval", code),
        "exec": call("builtins", "exec", code),
        "eval of Python 2": call("__builtin__", "eval", code),
        "getattr": call("builtins", "getattr", name("os", "system"), text("__call__")) + group(command) + b"R",
        "Popen": call("subprocess", "Popen", text("touch"), number(0)),
        "open": call("builtins", "open", text(canary), text("w")),
        "import": call("importlib", "import_module", text("this")),
        "nested name": name("builtins", "eval.__call__") + group(code) + b"R",
        "hook of a tensor": call(
            "torch._utils", "_rebuild_tensor_v2", storage(1), number(0), group(), group(), b"\x89", system
        ),
        "argument of a namespace": name("argparse", "Namespace") + b")\x81" + system + b"b",
        "INST": b"(" + command + b"iposix\nsystem\n",
        "OBJ": b"(" + name("posix", "system") + command + b"o",
        "STACK_GLOBAL": text("posix") + text("system") + b"\x93" + group(command) + b"R",
        "EXT1": b"\x82\x01" + group(command) + b"R",
        "persistent name": b"Pposix.system\n",
    }


def deep_tuple(depth: int) -> bytes:
    return b")" + b"\x85" * depth


def wide_tuple(depth: int) -> bytes:
    """Ten thousand million items for whoever looks at each: a tuple of ten times the same tuple, `depth` times."""
    return b"(" * depth + b")" + (b"q\x00" + b"h\x00" * 9 + b"t") * depth


def greedy() -> dict[str, bytes]:
    """Pickles that ask for memory, time or a crash through what torch's restricted reader allows."""
    ordered = call("collections", "OrderedDict")
    return {
        "storage of a tera": tensor(TERA, [TERA], [1]),
        "shape of a tera": tensor(2, [10**6, 10**6], [10**6, 1]),
        "stride of zero": tensor(2, [10**6, 10**6], [0, 0]),
        "offset outside": tensor(2, [2], [1], offset=TERA),
        "stride outside": tensor(2, [2], [TERA]),
        "negative size": tensor(2, [-2], [1]),
        "negative stride": tensor(2, [2], [-1]),
        "negative storage": tensor(-2, [0], [1]),
        "product that overflows": tensor(2, [2**32, 2**32, 2**32], [1, 1, 1]),
        "too many dimensions": tensor(2, [1] * 64, [1] * 64),
        "bytearray": call("builtins", "bytearray", number(TERA)),
        "legacy constructor": call("torch", "FloatTensor", number(10**6), number(10**6)),
        "storage constructor": call("torch.storage", "UntypedStorage", number(TERA)),
        "wrapper subclass": call("torch._utils", "_rebuild_wrapper_subclass", name("torch", "Tensor")),
        "type of choice": call("torch._tensor", "_rebuild_from_type_v2", name("torch", "Size"), b"N", b")", b"N"),
        "numpy array": call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), b")"),
        "other codec": call("_codecs", "encode", text("a" * 1000), text("idna")),
        "class of a namespace": b"N" + name("argparse", "Namespace") + b")\x81" + b"}" + text("a") + b"\x88s" + b"bs",
        "state of an ordered dict": ordered + b"}" + text("items") + name("torch", "FloatStorage") + b"sb",
        "state of a tensor": tensor(2, [2], [1]) + group(storage(2), number(0), group(number(TERA)), group()) + b"b",
        "long text": b"X" + struct.pack("<I", 2**32 - 1),
        "name without an end": b"c" + b"a" * 100_000,
        "many instructions": b"N" * 300_000,
        "call of a storage type": name("torch", "FloatStorage") + group(number(TERA)) + b"R",
    }


def keys() -> dict[str, bytes]:
    """Keys of a dictionary that take for ever, or all memory of the stack, to hash."""
    colliding = b"".join(number(k * (2**61 - 1)) + b"N" for k in range(1, 1000))
    return {
        "deep key": mapping(b"N", deep_tuple(200_000)),
        "wide key": mapping(b"N", wide_tuple(10)),
        "colliding keys": b"\x80\x02}(" + colliding + b"u.",
        "float key": mapping(b"N", b"G" + struct.pack(">d", 1.0)),
    }


def damaged_archives() -> dict[str, bytes]:
    pickled, numbers = mapping(tensor(2, [2], [1])), {"data/0": bytes(8)}
    good = archive(pickled, numbers)
    bomb = mapping(tensor(2**23, [2**23], [1]))
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as writer:
        for entry, content in (("data.pkl", pickled), ("data/0", bytes(8)), ("DATA/0", bytes(80))):
            writer.writestr(f"archive/{entry}", content)
    elsewhere = archive(pickled, numbers).replace(b"archive/data/0", b"another/data/0")
    directory = good.index(b"PK\x01\x02")
    overlapping = bytearray(good)
    second = good.index(b"PK\x01\x02", directory + 4)
    overlapping[second + 42 : second + 46] = struct.pack("<I", 0)  # the second entry begins where the first does
    larger = bytearray(good)
    larger[directory + 24 : directory + 28] = larger[directory + 20 : directory + 24] = struct.pack("<I", 2**31)
    return {
        "bomb of zeros": archive(bomb, {"data/0": bytes(2**25)}, method=zipfile.ZIP_DEFLATED),
        "bomb in the pickle": archive(mapping(b"N") + bytes(2**27), method=zipfile.ZIP_DEFLATED),
        "storage larger than its entry": archive(mapping(tensor(3, [3], [1])), numbers | {"data/1": bytes(80)}),
        "storage without an entry": archive(pickled),
        "storage elsewhere": archive(mapping(storage(2, key="../0"))),
        "two directories": good + good[directory:],
        "comment after the directory": good[:-2] + b"\x04\x00evil",
        "entry twice": twice.getvalue(),
        "entry in another folder": elsewhere,
        "entries that overlap": bytes(overlapping),
        "entry beyond the end": bytes(larger),
        "TorchScript": archive(pickled, numbers | {"constants.pkl": mapping(b"N")}),
        "no pickle": archive(pickled, numbers).replace(b"data.pkl", b"data.pkk"),
        "cut in half": good[: len(good) // 2],
        "start alone": b"PK\x03\x04",
        "tensors that share without end": archive(
            b"\x80\x02}(" + b"".join(text(f"w{i}") + tensor(2000, [2000], [1]) for i in range(50)) + b"u.",
            {"data/0": bytes(8000)},
        ),
        "size that changes": archive(
            b"\x80\x02](" + tensor(2, [2], [1]) + storage(2**20) + b"e.", {"data/0": bytes(8)}
        ),
        "long pickle": archive(b"N" * (17 << 20)),
    }


def damaged_legacy() -> dict[str, bytes]:
    pickled = mapping(tensor(2, [2], [1], view=b"N"))
    listed = b"\x80\x02]" + text("0") + b"a."
    good = legacy(pickled, listed, struct.pack("<q", 2) + bytes(8))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as writer:
        info = tarfile.TarInfo("storages")
        info.size = 4
        writer.addfile(info, io.BytesIO(b"evil"))
    return {
        "storage of another length": good[:-16] + struct.pack("<q", 2**40) + bytes(8),
        "numbers cut off": good[:-4],
        "storage not listed": legacy(pickled, b"\x80\x02].", bytes(16)),
        "storage listed that is not there": legacy(mapping(b"N"), listed, bytes(16)),
        "view of a storage": legacy(
            mapping(tensor(2, [2], [1], view=group(text("1"), number(0), number(TERA)))), listed, bytes(16)
        ),
        "other version": good.replace(b"M\xe9\x03.", b"M\xea\x03."),
        "keys that are numbers": legacy(pickled, b"\x80\x02]K\x00a.", struct.pack("<q", 2) + bytes(8)),
        "protocol 4": legacy(b"\x80\x04N."),
        "end after the start": LEGACY_START,
        "tar of torch 0.1": tar.getvalue(),
    }


def damaged_safetensors() -> dict[str, bytes]:
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    return {
        "header beyond the end": safetensors(small(), bytes(8), length=10_000),
        "header of all memory": safetensors(small(), bytes(8), length=2**63),
        "header of 17 MB": safetensors(b'{"a":"' + b"x" * (17 << 20) + b'"}'),
        "shape of a tera": safetensors(small(shape=[10**6, 10**6]), bytes(8)),
        "shape that overflows": safetensors(small(shape=[2**32, 2**32]), bytes(8)),
        "offsets beyond the end": safetensors(small(offsets=[0, 800], shape=[200]), bytes(8)),
        "offsets backwards": safetensors(small(offsets=[8, 0]), bytes(8)),
        "negative shape": safetensors(small(shape=[-2]), bytes(8)),
        "unknown kind": safetensors(small(dtype="PY"), bytes(8)),
        "deep header": safetensors(deep),
        "list for a header": safetensors(b"[1]     "),
        "no JSON": safetensors(b"{]}     "),
    }


def other_files() -> dict[str, bytes]:
    return {
        "empty": b"",
        "web page": b"<!DOCTYPE html><html>not found</html>",
        "pointer of git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "gzip": b"\x1f\x8b\x08\x00" + bytes(20),
        "plain pickle": pickle.dumps({"a": 1}),
        "text": b"epoch,loss\n1,2\n",
        "image": b"\x89PNG\r\n\x1a\n" + bytes(40),
        "zeros": bytes(1000),
    }


def hostile_files(canary: str) -> dict[str, bytes]:
    """All of the above, pickles both in archives and in the format before torch 1.6."""
    pickles = {what: mapping(value) for what, value in (executing(canary) | greedy()).items()} | keys()
    numbers = {"data/0": bytes(8)}
    return {
        **{f"{what}, archive": archive(data, numbers) for what, data in pickles.items()},
        **{f"{what}, legacy": legacy(data) for what, data in pickles.items()},
        **damaged_archives(),
        **damaged_legacy(),
        **damaged_safetensors(),
        **other_files(),
    }


def original(state: Mapping[str, torch.Tensor], container: str) -> bytes:
    """A good checkpoint: `archive`, `legacy` or `safetensors`."""
    if container == "safetensors":
        return save({name: tensor.contiguous() for name, tensor in state.items()})
    file = io.BytesIO()
    content = {"state_dict": dict(state), "epoch": 3, "args": {"lr": 0.1}}
    torch.save(content, file, _use_new_zipfile_serialization=container == "archive")
    return file.getvalue()


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A file with flipped, removed, inserted, repeated or exchanged bytes, more often where its structure is."""
    changed = bytearray(data)
    structure = min(len(data), 4000)

    def place() -> int:
        edge = draw.randrange(structure)
        return draw.choice([edge, len(changed) - 1 - edge, draw.randrange(len(changed))])

    kind = draw.choice(["flip", "flip", "cut", "insert", "remove", "repeat", "exchange", "fill"])
    start = place() % len(changed)
    length = draw.choice([1, 2, 4, 8, 100])
    if kind == "flip":
        for _ in range(draw.choice([1, 2, 8, 64])):
            changed[place() % len(changed)] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del changed[start:]
    elif kind == "insert":
        changed[start:start] = draw.randbytes(length)
    elif kind == "remove":
        del changed[start : start + length]
    elif kind == "repeat":
        changed[start:start] = changed[start : start + length]
    elif kind == "exchange":
        other = place() % len(changed)
        changed[start : start + length], changed[other : other + length] = (
            changed[other : other + length],
            changed[start : start + length],
        )
    else:
        changed[start : start + length] = draw.choice([b"\xff", b"\x00", b"\x7f"]) * length
    return bytes(changed)
