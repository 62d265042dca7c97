"""Checkpoints in the layout of PFGM++ and EDM, which pickle their networks with the program text beside them."""

import contextlib
import pickle
import sys
import types

import torch


def _reconstruct_persistent_obj(meta):
    raise AssertionError("a published network was rebuilt")


class EasyDict(dict):
    pass


class PublishedModule(torch.nn.Module):
    """A module that is pickled as the published ones are."""

    class_name = "Block"
    source = "raise AssertionError('program text of a checkpoint was run')"

    def __reduce__(self):
        meta = EasyDict(type="class", version=6, module_src=self.source, class_name=self.class_name)
        arguments = EasyDict(self.__dict__.get("_init_kwargs", {}))
        meta["state"] = dict(self.__dict__, _init_args=(), _init_kwargs=arguments)
        meta["state"].pop("class_name", None)
        return _reconstruct_persistent_obj, (meta,)


@contextlib.contextmanager
def their_modules():
    """What the pickles name can be found, as it must to write them."""
    names = {"torch_utils.persistence": _reconstruct_persistent_obj, "dnnlib.util": EasyDict}
    added = {}
    for name, value in names.items():
        value.__module__ = name
        module = types.ModuleType(name)
        setattr(module, value.__name__, value)
        added |= {name.partition(".")[0]: types.ModuleType(name.partition(".")[0]), name: module}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def network(weights, inside, outside, class_names=("EDMPrecond", "SongUNet")):
    """A network with the tensors of these names."""
    song = PublishedModule()
    song.class_name, song._init_kwargs = class_names[1], inside
    for key, tensor in weights.items():
        *path, name = key.split(".")
        place = song
        for depth, part in enumerate(path):
            if part not in place._modules:
                place.add_module(part, torch.nn.ModuleDict() if depth == 0 and len(path) > 1 else PublishedModule())
            place = place._modules[part]
        if name in ("resample_filter", "freqs"):
            place.register_buffer(name, tensor)
        else:
            place.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    whole = PublishedModule()
    whole.class_name, whole._init_kwargs = class_names[0], outside
    whole.sigma_data = outside.get("sigma_data", 0.5)
    whole.model = song
    return whole


def write(path, ema, net=None):
    """`*.pkl` as networks are published, `*.pt` as training leaves them."""
    with their_modules():
        if path.suffix == ".pkl":
            content = dict(ema=ema, loss_fn=None, augment_pipe=None, dataset_kwargs=EasyDict(resolution=16))
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(dict(optimizer_state={"state": {}}, step=7, ema=ema, net=net), path)
    return path
