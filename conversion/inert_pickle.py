"""Reads pickles without running anything of them.

A pickle is a program: it may name any function there is and have it called. Here every name, whatever it is, stands
for a class that only writes down what it was called with. What comes out of `load` are plain containers, numbers and
texts, and `Record`s of all else. Tensors are then built of the records by name (`tensor_of`), from bytes of the file.
"""

import copyreg
import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO


if TYPE_CHECKING:
    import torch


# The classes of torch that stand for the type of a tensor's numbers.
DTYPES = {
    "torch.FloatStorage": "float32",
    "torch.DoubleStorage": "float64",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
MAGIC = 0x1950A86A20F9469CFC6C  # what a file of torch begins with that is no archive

# Says what bytes the storage of a key has.
Storages = Callable[[str], memoryview]


class Record:
    """
    What a pickle says of an object of any class, as data.

    `name` is the class or function, `arguments` what it was called with, `state` what it was to be restored from, and
    `items` what a mapping or list held.
    """

    name = ""
    __slots__ = ("arguments", "items", "state")

    def __new__(cls, *arguments, **keywords):
        record = super().__new__(cls)
        record.arguments, record.state, record.items = (*arguments, *keywords.values()), None, {}
        return record

    def __init__(self, *arguments, **keywords):
        pass

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        self.items[key] = value

    def append(self, value):
        self.items[len(self.items)] = value

    def extend(self, values):
        for value in values:
            self.append(value)


class _Stored(Record):
    """A reference to something outside of the pickle."""

    __slots__ = ()


class _Reader(pickle.Unpickler):
    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.kinds: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> type[Record]:
        name = f"{module}.{name}"
        if name not in self.kinds:
            self.kinds[name] = type("Record", (Record,), {"name": name, "__slots__": ()})
        return self.kinds[name]

    def persistent_load(self, reference) -> Record:
        return _Stored(reference)


def check_operations(file: BinaryIO) -> None:
    """Refuses what would make the reading itself costly: lengths and places that lie beyond the end of the pickle."""
    begin, count = file.tell(), 0
    for operation, argument, _ in pickletools.genops(file):  # which refuses lengths beyond the end
        count += 1
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
            raise ValueError(f"it remembers object number {argument} of {count}")
    file.seek(begin)


def load(file: BinaryIO) -> Any:
    """The next pickle of a file. Whatever is wrong with it is a `ValueError`."""
    copyreg.clear_extension_cache()  # otherwise numbered classes are not looked up by `find_class`
    try:
        check_operations(file)
        return _Reader(file).load()
    except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, MemoryError, OverflowError,
            RecursionError, TypeError, ValueError) as error:  # fmt: skip
        raise ValueError(f"{type(error).__name__}: {error}") from None
    finally:
        copyreg.clear_extension_cache()


def read_inert(path: Path) -> tuple[Any, Storages]:
    """What a file of `torch.save` or `pickle.dump` holds, and the storages of its tensors (for `tensor_of`)."""
    if zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        if "data.pkl" not in entries or any(entry.compress_type for entry in entries.values()):
            raise ValueError("it is an archive, but not one of torch.save")

        def storage(key: str) -> memoryview:
            if f"data/{key}" not in entries:
                raise ValueError(f"it has no storage {key!r}")
            return memoryview(archive.read(entries[f"data/{key}"]))

        return load(io.BytesIO(archive.read(entries["data.pkl"]))), storage
    with open(path, "rb") as file:
        if file.read(2) == b"PK":
            raise ValueError("it is an archive that is cut short")
        file.seek(0)
        content = load(file)
        if content == MAGIC:
            raise ValueError("it was written by a version of torch before 1.6")
    return content, no_storage


def no_storage(key: str) -> memoryview:
    raise ValueError(f"it has no storage {key!r}")


def embedded_storage(*arguments: Any) -> tuple["torch.dtype", memoryview]:
    """The storage in the bytes that a tensor's storage is pickled as outside of `torch.save`."""
    data = arguments[0] if arguments else None
    if not isinstance(data, bytes):
        raise ValueError("a storage in it is of an unknown format")
    file = io.BytesIO(data)
    magic, _, _, reference, _ = (load(file) for _ in range(5))
    if magic != MAGIC:
        raise ValueError("a storage in it is of an unknown format")
    dtype, _ = read_reference(reference)
    return dtype, memoryview(data)[file.tell() + 8 :]  # after the number of its elements


def read_reference(reference: Any) -> tuple["torch.dtype", str]:
    """The type and the key of a storage."""
    import torch

    content = reference.arguments[0] if isinstance(reference, _Stored) else None
    if isinstance(content, tuple) and len(content) >= 3 and content[0] == "storage" and isinstance(content[1], type):
        dtype = DTYPES.get(getattr(content[1], "name", ""))
        if dtype is not None and isinstance(content[2], str):
            return getattr(torch, dtype), content[2]
    raise ValueError("a tensor in it has a storage of an unknown kind")


def is_record(value: Any, *names: str) -> bool:
    return isinstance(value, Record) and value.name in names


def tensor_of(value: Any, storages: Storages) -> "torch.Tensor":
    """The tensor (or parameter) that a record stands for, with memory of its own."""
    import torch

    while is_record(value, "torch._utils._rebuild_parameter") and value.arguments:
        value = value.arguments[0]
    if not is_record(value, "torch._utils._rebuild_tensor_v2") or len(value.arguments) < 4:
        raise ValueError(f"a tensor was expected where it has {describe(value)}")
    storage, offset, size, stride = value.arguments[:4]
    if is_record(storage, "torch.storage._load_from_bytes"):
        dtype, data = embedded_storage(*storage.arguments)
    else:
        dtype, key = read_reference(storage)
        data = storages(key)
    sizes = (size, stride) if isinstance(size, tuple) and isinstance(stride, tuple) else ((), (0,))
    whole = all(type(number) is int and number >= 0 for number in (offset, *sizes[0], *sizes[1]))
    if not whole or len(sizes[0]) != len(sizes[1]):
        raise ValueError("a tensor in it has no valid shape")
    elements = len(data) // dtype.itemsize
    count, last = 1, offset
    for length, step in zip(size, stride, strict=True):
        count, last = count * length, last + max(length - 1, 0) * step
    if count and (last >= elements or count > elements):
        raise ValueError(f"a tensor in it has the shape {size}, but its storage holds {elements} numbers")
    if not count:
        return torch.empty(size, dtype=dtype)
    numbers = torch.frombuffer(bytearray(data[: elements * dtype.itemsize]), dtype=dtype)
    return numbers.as_strided(size, stride, offset).contiguous()


def mapping_of(value: Any) -> Mapping:
    """A dictionary, or the items of a record of one."""
    if isinstance(value, dict):
        return value
    return value.items if isinstance(value, Record) else {}


def describe(value: Any) -> str:
    return value.name or "a reference" if isinstance(value, Record) else f"a {type(value).__name__}"
