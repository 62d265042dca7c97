"""One call each that loads whichever audio tokenizer or vocoder a name stands for."""

import os
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError

from tonefield.command_line import UserError
from tonefield.hub import hub_reason
from tonefield.models.audio_tokenizer_mulaw import MuLawTokenizer
from tonefield.models.codec_fsq import FSQCodec
from tonefield.models.codec_transformers import TransformersCodec
from tonefield.models.wavtokenizer import WavTokenizer


TOKENIZERS = (MuLawTokenizer, FSQCodec, TransformersCodec, WavTokenizer)


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
                return cls.from_pretrained(name, **{"use_safetensors": True, **kwargs})
        if "_class_name" not in config and "model_type" in config:
            return TransformersCodec.from_transformers(name, **kwargs)
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
                vocoder: Any = cls.from_pretrained(name, **{"use_safetensors": True, **kwargs})
                return vocoder.requires_grad_(False).eval()
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
