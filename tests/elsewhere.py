"""
A device that is not there. Its tensors keep their numbers in the processor's memory and are computed by the processor,
so that results can be compared bit for bit; but they may do only what those of a real device may:

- no meeting of tensors of different devices, nor of a generator and a tensor of different devices,
- no float64 where the device is called `mps`,
- and it is noted whenever the host waits for the device: for a number (`item`), for a shape that depends on numbers
  (`nonzero`), or for a copy in either direction that is not `non_blocking`. `torch.cuda.set_sync_debug_mode` notes the
  same on a real one.

    with elsewhere("cuda") as place:
        pipe.to("cuda")
        place.waits  # where in the code the host waited so far
"""

import contextlib
import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map


aten = torch.ops.aten
SHAPE_OF_NUMBERS = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
                    aten.repeat_interleave.Tensor, aten.bincount.default, aten.equal.default}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
LIKE = {aten.new_empty.default, aten.new_empty_strided.default, aten.new_zeros.default, aten.new_full.default,
        aten.empty_like.default}  # fmt: skip
COPIES = {aten._to_copy.default, aten.copy_.default, aten.set_.source_Tensor}


class Far(torch.Tensor):
    """A tensor of that device. To all that is below Python it is one of the processor, for autograd's sake."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, place: torch.device):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device="cpu",
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor, place: torch.device):
        self.inner, self.place = inner, place

    @property
    def device(self) -> torch.device:  # pyright: ignore
        return self.place

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} of a tensor that is elsewhere, after the device was left.")

    def __repr__(self):
        return f"Far({self.inner}, {self.place})"


class FarGenerator(torch.Generator):
    """In the place of `torch.Generator`, of either device."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:  # pyright: ignore
        return self.place

    def manual_seed(self, seed):
        super().manual_seed(seed)
        return self


class Computing(TorchDispatchMode):
    def __init__(self, place: torch.device):
        super().__init__()
        self.place, self.waits = place, []

    def wait(self, why) -> None:
        frames = [frame for frame in traceback.extract_stack() if "site-packages" not in frame.filename]
        ours = [frame for frame in frames if not frame.filename.endswith("elsewhere.py")]
        self.waits.append(f"{why} at " + " < ".join(f"{f.filename}:{f.lineno}" for f in ours[:-4:-1]))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        far = [value for value in tensors if isinstance(value, Far)]
        target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        there = bool(far) if target is None else target.type == self.place.type
        if func is aten.copy_.default or func in LIKE:  # code below Python takes the first tensor's device
            there = isinstance(args[0], Far)
        self.check(func, args, kwargs, tensors, far, there)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        wrapped = {id(value.inner): value for value in far}
        near_args, near_kwargs = tree_map(lambda v: v.inner if isinstance(v, Far) else v, (args, kwargs))
        result = func(*near_args, **near_kwargs)

        def wrap(value):
            if not isinstance(value, torch.Tensor) or not there:
                return value
            if self.place.type == "mps" and value.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func}: mps has no {value.dtype}.")
            return wrapped.get(id(value)) if id(value) in wrapped else Far(value, self.place)

        return tree_map(wrap, result)

    def check(self, func, args, kwargs, tensors, far, there) -> None:
        source = kwargs.get("generator")
        if isinstance(source, torch.Generator) and (source.device.type == self.place.type) != there:
            raise RuntimeError(f"{func}: the generator is of {source.device}, the tensor is not.")
        if func in COPIES:
            crosses = there != isinstance(args[1 if func is aten.copy_.default else 0], Far)
            if crosses and not (kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,))):
                self.wait(f"copy {'to' if there else 'from'} the device")
            return
        if not far:
            return
        if func is aten._local_scalar_dense.default:
            return self.wait("a number is read")
        if func in SHAPE_OF_NUMBERS:
            return self.wait(func)
        if func in INDEXING:
            if not isinstance(args[0], Far):
                raise RuntimeError(f"{func}: the indices are of {self.place}, the tensor is not.")
            for index in args[1]:
                if index is not None and (index.dtype == torch.bool or not isinstance(index, Far)):
                    self.wait(f"{func} by a mask, or by an index of the processor")
            tensors = [args[0], *args[2:3]]
        near = [value for value in tensors if not isinstance(value, Far) and value.ndim > 0]
        if near:
            raise RuntimeError(f"{func}: tensors of {self.place} and of the processor, {near[0].shape}.")


class Moving(TorchFunctionMode):
    """What Python asks of a tensor's device, which those below Python do not know."""

    def __init__(self, computing: Computing):
        super().__init__()
        self.computing = computing

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cpu, torch.Tensor.cuda):
            kwargs["device"] = "cpu" if func is torch.Tensor.cpu else self.computing.place
            func = torch.Tensor.to
        if func is torch.Tensor.numpy and isinstance(args[0], Far):
            raise TypeError(f"a tensor of {self.computing.place} has no numbers for NumPy: use .cpu() first.")
        if func is torch.Tensor.tolist and isinstance(args[0], Far):
            return self.to(args[0], "cpu").tolist()
        if func is torch.Tensor.to:
            return self.to(*args, **kwargs)
        if func is torch.as_tensor and isinstance(args[0], torch.Tensor):
            return self.to(args[0], kwargs.get("device") or args[0].device, kwargs.get("dtype") or args[0].dtype)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return self.to(func(*args, **kwargs | {"device": None}), kwargs["device"])
        return func(*args, **kwargs)

    def to(self, tensor, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        far = device is not None and device.type == self.computing.place.type
        if device is None or far == isinstance(tensor, Far):
            options = {"memory_format": memory_format} if memory_format is not None else {}
            return torch.Tensor.to(tensor, dtype or tensor.dtype, copy=copy, **options)
        return aten._to_copy.default(tensor, dtype=dtype, device=device, non_blocking=non_blocking)


@contextlib.contextmanager
def elsewhere(name: str):
    """In here there is a device of that name."""
    computing = Computing(torch.device(name, 0))
    generator, swap = torch.Generator, torch.__future__.get_swap_module_params_on_conversion()
    start, group = torch.cuda._lazy_init, torch._C._group_tensors_by_device_and_dtype

    def group_here(*args, **kwargs):
        groups = group(*args, **kwargs).items()
        return {(rows[0][0].device if rows[0] else key[0], key[1]): (rows, index) for key, (rows, index) in groups}

    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.Generator = FarGenerator  # pyright: ignore
    torch.cuda._lazy_init = lambda: None  # there is nothing to start
    torch._C._group_tensors_by_device_and_dtype = group_here
    try:
        with computing, Moving(computing):
            yield computing
    finally:
        torch.Generator, torch.cuda._lazy_init = generator, start
        torch._C._group_tensors_by_device_and_dtype = group
        torch.__future__.set_swap_module_params_on_conversion(swap)
