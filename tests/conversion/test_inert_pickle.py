"""Pickles that would run something run nothing here, and tensors come out of what they say."""

import collections
import contextlib
import copyreg
import io
import os
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from tonefield.conversion import inert_pickle
from tonefield.conversion.inert_pickle import Record, read_inert, tensor_of


def read(data):
    return inert_pickle.load(io.BytesIO(data))


# What runs something when it is unpickled. All of it leaves a file as its mark.


class Call:
    """Pickles as a call, with a state, items and pairs to restore its result with."""

    def __init__(self, function, *arguments, state=None, items=None, pairs=None):
        self.content = (function, arguments, state, items and iter(items), pairs and iter(pairs))

    def __reduce__(self):
        return self.content


class WithState:
    def __setstate__(self, state):
        open(state, "w").close()


class WithItems(list):
    def append(self, item):
        open(item, "w").close()

    def extend(self, items):
        open(items[0], "w").close()


class WithPairs(dict):
    def __setitem__(self, key, value):
        open(value, "w").close()


class WithNew:
    def __new__(cls, mark):
        open(mark, "w").close()
        return super().__new__(cls)


def shell(mark):
    return f"touch {mark}"


def program(mark):
    return f"open({mark!r}, 'w').close()"


def text(value):
    return b"S'" + value.encode() + b"'\n"


def named(cls):
    return f"c{cls.__module__}\n{cls.__name__}\n".encode()


ATTACKS = {
    "os.system": lambda mark: pickle.dumps(Call(os.system, shell(mark))),
    "builtins.eval": lambda mark: pickle.dumps(Call(eval, program(mark))),
    "builtins.exec": lambda mark: pickle.dumps(Call(exec, program(mark)), protocol=0),
    "getattr chain": lambda mark: b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR("
                                  + text(shell(mark)) + b"tR.",
    "a dotted name": lambda mark: b"\x80\x04" + pickle.dumps("tempfile", 4)[2:-1] + pickle.dumps("_os.system", 4)[2:-1]
                                  + b"\x93" + pickle.dumps((shell(mark),), 4)[2:-1] + b"R.",
    "in a state": lambda mark: pickle.dumps(Call(collections.deque, state={"a": [Call(eval, program(mark))]})),
    "as a key": lambda mark: pickle.dumps({Call(os.system, shell(mark)): 1}),
    "in a set": lambda mark: pickle.dumps({1, Call(os.system, shell(mark))}),
    "__setstate__": lambda mark: pickle.dumps(Call(WithState, state=mark)),
    "append": lambda mark: pickle.dumps(Call(WithItems, items=[mark])),
    "extend": lambda mark: pickle.dumps(Call(WithItems, items=[mark, mark])),
    "__setitem__": lambda mark: pickle.dumps(Call(WithPairs, pairs=[("a", mark)])),
    "__new__": lambda mark: b"\x80\x02" + named(WithNew) + b"(" + text(mark) + b"t\x81.",
    "copyreg": lambda mark: b"ccopyreg\n__newobj__\n(" + named(WithNew) + text(mark) + b"tR.",
    "INST": lambda mark: b"(" + text(shell(mark)) + b"ios\nsystem\n.",
    "OBJ": lambda mark: b"(cos\nsystem\n" + text(shell(mark)) + b"o.",
    "bytes of a storage": lambda mark: pickle.dumps(
        Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, shell(mark))))
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_run(attack, tmp_path):
    data, mark = ATTACKS[attack](str(tmp_path / "mark")), tmp_path / "mark"
    try:
        pickle.loads(data)
    except Exception as error:
        print(error)
    assert mark.exists(), "this is no attack"
    mark.unlink()
    with contextlib.suppress(ValueError):  # what was made by a call cannot be called
        assert isinstance(read(data), (Record, dict, set))
    # The same in an archive of torch, in the place of its content.
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", data)
    with contextlib.suppress(ValueError):
        read_inert(tmp_path / "a.pt")
    assert not mark.exists()


def test_numbered_names(tmp_path):
    """What a number stands for is looked up in a table of the process, which remembers what it has found."""
    copyreg.add_extension("posix", "system", 240)
    try:
        data = b"\x82\xf0(" + text(shell(tmp_path / "mark")) + b"tR."
        pickle.loads(data)
        (tmp_path / "mark").unlink()
        assert read(data).name == "posix.system"
        assert not (tmp_path / "mark").exists()
        pickle.loads(data)  # which works as before
        assert (tmp_path / "mark").exists()
    finally:
        copyreg.remove_extension("posix", "system", 240)


def tensor_record(storage, size=(2,), stride=(1,), offset=0):
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, collections.OrderedDict())


def test_storages_that_are_none(tmp_path):
    """What stands in the place of a tensor's storage is not run either."""
    mark = tmp_path / "mark"
    inside = pickle.dumps(Call(os.system, shell(mark)))
    for storage in (
        Call(torch.storage._load_from_bytes, inside),
        Call(torch.storage._load_from_bytes, Call(os.system, shell(mark))),
        Call(torch.storage._load_from_bytes, pickle.dumps(inert_pickle.MAGIC) + 4 * inside),
        Call(torch.storage._load_from_bytes, b"S'x'\n."),
        Call(torch.storage._load_from_bytes),
        Call(os.system, shell(mark)),
        "text",
    ):
        record = read(pickle.dumps(tensor_record(storage)))
        with pytest.raises(ValueError):
            tensor_of(record, inert_pickle.no_storage)
    assert not mark.exists()

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return ("storage", os.system, shell(mark), "cpu", 2) if thing == "reference" else None

    Pickler(file := io.BytesIO()).dump(tensor_record("reference"))
    with pytest.raises(ValueError, match="storage of an unknown kind"):
        tensor_of(read(file.getvalue()), inert_pickle.no_storage)
    assert not mark.exists()


def test_records_say_what_was_to_be_done():
    record = read(pickle.dumps(Call(os.system, "a", 1, state={"b": 2}, pairs=[("c", 3)])))
    assert (record.name, record.arguments) == ("posix.system", ("a", 1))
    assert (record.state, record.items) == ({"b": 2}, {"c": 3})
    assert read(pickle.dumps(Call(os.system, items=[5, 6]))).items == {0: 5, 1: 6}
    assert type(read(pickle.dumps(np.float64(1)))).name.endswith("multiarray.scalar")
    assert all(isinstance(value, (Record, bytes)) for value in read(pickle.dumps(np.float64(1))).arguments)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_containers(protocol):
    # Sets are names of a class before protocol 4.
    plain = {"a": [1, 2.5, None, True, "text", 2**70], (1, b"bytes" if protocol > 2 else "b"): {"deep": [()]}}
    if protocol >= 4:
        plain["set"] = {1, 2}, frozenset("ab")
    plain["again"] = plain["a"]
    result = read(pickle.dumps(plain, protocol))
    assert result == plain and result["again"] is result["a"]


def test_tensors(tmp_path):
    base = torch.arange(24).reshape(2, 3, 4)
    tensors = {
        str(dtype): base.to(dtype)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                      torch.int16, torch.int8, torch.uint8, torch.bool)
    }  # fmt: skip
    tensors |= {
        "view": base.float()[1:, ::2].transpose(0, 2), "number": torch.tensor(3.5), "none": torch.zeros(0, 3),
        "shared": tensors["torch.float32"][1], "parameter": torch.nn.Parameter(base.float()),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "a.pt")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tensors))
    for name in ("a.pt", "a.pkl"):
        content, storages = read_inert(tmp_path / name)
        assert content.keys() == tensors.keys()
        for key, expected in tensors.items():
            tensor = tensor_of(content[key], storages)
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), key
            assert type(tensor) is torch.Tensor and tensor.is_contiguous()


def test_damaged_files(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"written by a version of torch before 1\.6"):
        read_inert(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"not one of torch\.save"):
        read_inert(tmp_path / "b.pt")
    with zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as archive:  # which may grow without bounds
        archive.writestr("c/data.pkl", pickle.dumps({}))
    with pytest.raises(ValueError, match=r"not one of torch\.save"):
        read_inert(tmp_path / "c.pt")
    torch.save({"a": torch.ones(3)}, tmp_path / "d.pt")
    with zipfile.ZipFile(tmp_path / "d.pt") as whole, zipfile.ZipFile(tmp_path / "e.pt", "w") as archive:
        archive.writestr("e/data.pkl", whole.read("d/data.pkl"))
    content, storages = read_inert(tmp_path / "e.pt")
    with pytest.raises(ValueError, match="has no storage '0'"):
        tensor_of(content["a"], storages)
    whole = pickle.dumps({"a": [1, 2, {"b": "text"}]})
    for end in range(len(whole)):
        with pytest.raises(ValueError):
            read(whole[:end])


def test_absurd_sizes():
    """A few bytes do not ask for more memory than they are worth."""
    number = (2**40).to_bytes(8, "little")
    tracemalloc.start()
    for data in (
        b"\x80\x04\x8e" + number + b"x.",  # bytes
        b"\x80\x04\x8d" + number + b"x.",  # text
        b"\x80\x05\x96" + number + b"x.",  # a byte array
        b"\x80\x04\x95" + number + b"x.",  # a frame
        b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b"x.",  # a number
    ):
        with pytest.raises(ValueError):
            read(data)
    for data in (b"\x80\x02]r" + (2**31).to_bytes(4, "little") + b".", b"(lp4294967296\n."):
        with pytest.raises(ValueError, match=r"it remembers object number \d{10} of \d"):  # which needs a table
            read(data)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    stored = torch.ones(4)._typed_storage()
    for size, stride, offset in (
        ((2**40,), (0,), 0), ((2, 2), (2**40, 1), 0), ((4,), (1,), 1), ((5,), (1,), 0), ((-1,), (1,), 0),
        ((2,), (-1,), 3), ((2, 2), (1,), 0), ((2.0,), (1,), 0), ((True,), (1,), 0), ((4,), (1,), -1), ([4], [1], 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"in it has (no valid shape|the shape .* holds 4 numbers)"):
            tensor_of(read(pickle.dumps(tensor_record(stored, size, stride, offset))), inert_pickle.no_storage)
    whole = tensor_of(read(pickle.dumps(tensor_record(stored, (4,)))), inert_pickle.no_storage)
    assert torch.equal(whole, torch.ones(4))


def test_operations_that_make_no_sense():
    for data in (
        b"cos\nsystem\n}S'a'\nS'b'\nsb.",  # the state of a class
        b"cos\nsystem\n(S'a'\nS'b'\nu.",  # items of a class
        b"cos\nsystem\nS'a'\na.",
        b"cos\nsystem\n(S'a'\ntR(S'b'\ntR.",  # a call of the result
        b"](S'a'\ntR.",
        b"]S'a'\nb.",  # the state of a list
        b"}]I1\ns.",  # a list as a key
        b"R.",
        b".",
        b"I" + b"9" * 5000 + b"\n.",
    ):
        with pytest.raises(ValueError):
            read(data)
    assert Record.name == "" and Record.__slots__ == ("arguments", "items", "state")
