"""One call each that loads whichever audio tokenizer or vocoder a name stands for."""

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError
from safetensors import safe_open
from transformers import T5EncoderModel

from tonefield.command_line import UserError, first_line
from tonefield.hub import hub_reason
from tonefield.models.audio_tokenizer_mulaw import MuLawTokenizer
from tonefield.models.codec_fsq import FSQCodec
from tonefield.models.codec_transformers import TransformersCodec
from tonefield.models.wavtokenizer import WavTokenizer


TOKENIZERS = (MuLawTokenizer, FSQCodec, TransformersCodec, WavTokenizer)


def load_safely(from_pretrained: Callable, name: str, **kwargs) -> Any:
    """What a class makes of a folder of anybody's: whatever it stumbles over there is a `ValueError` of one line."""
    try:
        return from_pretrained(name, **kwargs)
    except (OSError, ValueError, HTTPError, NotImplementedError):  # the last one of an argument
        raise
    except Exception as error:
        raise ValueError(f"{name} is damaged: {type(error).__name__}: {first_line(error)}") from error


def check_complete(model: Any, what: str, subfolder: str | None = None) -> None:
    """Refuses a network of diffusers, or a T5, of whose tensors some are in none of its files: the libraries make them
    up, and only warn."""
    if not isinstance(model, (ModelMixin, T5EncoderModel)):
        return
    folder: Any = model.name_or_path if isinstance(model, T5EncoderModel) else model.config.get("_name_or_path")
    files = list(Path(folder, subfolder or "").glob("*.safetensors")) if folder else []
    if not files:
        return
    stored: OrderedDict[str, Any] = OrderedDict()
    for file in files:
        with safe_open(file, "pt") as tensors:
            stored |= dict.fromkeys(tensors.keys())
    if isinstance(model, ModelMixin):
        # They had other names once. `output_loading_info` tells as much, but not of the networks of a pipeline.
        model._fix_state_dict_keys_on_load(stored)
    state = model.state_dict()
    shared = {state[name].data_ptr() for name in state.keys() & stored.keys()}  # one tensor, two names
    if missing := sorted(name for name in state.keys() - stored.keys() if state[name].data_ptr() not in shared):
        raise ValueError(f"{len(missing)} tensors of {what} are missing, the first is {missing[0]}.")


def _whole(cls: Any, name: str, kwargs: dict[str, Any]) -> Any:
    model = load_safely(cls.from_pretrained, name, **{"use_safetensors": True, **kwargs})
    check_complete(model, name, kwargs.get("subfolder"))
    return model


def load_audio_tokenizer(
    name_or_path: str | os.PathLike, **kwargs
) -> MuLawTokenizer | FSQCodec | TransformersCodec | WavTokenizer:
    """
    Load an audio tokenizer by name, from a folder, or from the Hub.

    Args:
        name_or_path (`str` or `os.PathLike`):
            `"mulaw"`; or a folder or Hub id that holds a tokenizer of tonefield (what `train_codec.py`,
            `python -m tonefield.conversion.wavtokenizer` and `save_pretrained` write), or a codec of transformers:
            EnCodec, DAC, Mimi.
        kwargs: What the tokenizer's `from_pretrained` takes; for `"mulaw"` its arguments.

    Example:
        ```py
        codec = tonefield.models.load_audio_tokenizer("facebook/encodec_24khz")
        codes = codec.encode(waveform, sampling_rate=44100)
        ```
    """
    name = os.fspath(name_or_path)
    if name == "mulaw":
        return MuLawTokenizer(**kwargs)
    subfolder = {"subfolder": kwargs["subfolder"]} if "subfolder" in kwargs else {}
    try:
        config = FSQCodec.load_config(name, **subfolder)
        for cls in TOKENIZERS:
            if config.get("_class_name") == cls.__name__:
                return _whole(cls, name, kwargs)
        if "_class_name" not in config and "model_type" in config:
            return load_safely(TransformersCodec.from_transformers, name, **kwargs)
    except (OSError, HTTPError) as error:
        raise OSError(
            f"{name} is neither 'mulaw', nor a folder or Hub id of an audio tokenizer that can be read:"
            f" {hub_reason(error)}"
        ) from error
    raise ValueError(
        f"{name} holds a {config.get('_class_name', 'model of an unknown kind')}, which is no audio tokenizer: those"
        f" are {', '.join(cls.__name__ for cls in TOKENIZERS)}, and EnCodec, DAC and Mimi of transformers."
    )


def load_vocoder(name_or_path: str | os.PathLike, **kwargs) -> ModelMixin:
    """
    Load a vocoder for the mels of the method `"bigvgan"`.

    Args:
        name_or_path (`str` or `os.PathLike`):
            A folder or Hub id: of a BigVGAN as it is published, such as
            `"nvidia/bigvgan_v2_44khz_128band_256x"`, or of what `python -m tonefield.conversion.bigvgan` and
            `save_pretrained` write.
        kwargs: What `from_pretrained` takes to find it: `subfolder`, `revision`, `token`, `cache_dir`, ...

    Returns:
        An `MMAudioVocoder` or an `LTX2Vocoder`, in float32: half precision is heard.

    Example:
        ```py
        pipe.vocoder = tonefield.models.load_vocoder("nvidia/bigvgan_v2_44khz_128band_256x")
        ```
    """
    from diffusers import MMAudioVocoder
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    from tonefield.conversion.bigvgan import CONFIG, GENERATOR, convert_bigvgan

    name = os.fspath(name_or_path)
    try:
        config = MMAudioVocoder.load_config(name, **kwargs)
        for cls in (MMAudioVocoder, LTX2Vocoder):
            if config.get("_class_name") == cls.__name__:
                return _whole(cls, name, kwargs).requires_grad_(False).eval()
        if "_class_name" not in config and "upsample_initial_channel" in config:
            if os.path.isdir(name):
                return convert_bigvgan(os.path.join(name, kwargs.get("subfolder") or ""))  # pyright: ignore
            hf_hub_download(name, CONFIG, **kwargs)
            return convert_bigvgan(hf_hub_download(name, GENERATOR, **kwargs))  # pyright: ignore
    except (OSError, HTTPError) as error:
        raise OSError(
            f"{name} is neither a folder nor a Hub id of a vocoder that can be read: {hub_reason(error)}"
        ) from error
    except UserError as error:
        raise ValueError(str(error)) from None
    raise ValueError(
        f"{name} holds a {config.get('_class_name', 'model of an unknown kind')}, which is no vocoder: those are"
        " MMAudioVocoder, LTX2Vocoder, and BigVGAN as it is published."
    )
