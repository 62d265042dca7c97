"""One call that loads whichever audio tokenizer a name stands for."""

import os

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
    except OSError as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{name} is neither 'mulaw', nor a folder or Hub id of an audio tokenizer that can be read: {reason}"
        ) from error
    for cls in TOKENIZERS:
        if config.get("_class_name") == cls.__name__:
            return cls.from_pretrained(name, **kwargs)
    if "_class_name" not in config and "model_type" in config:
        return TransformersCodec.from_transformers(name, **kwargs)
    raise ValueError(
        f"{name} holds a {config.get('_class_name', 'model of an unknown kind')}, which is no audio tokenizer: those"
        f" are {', '.join(cls.__name__ for cls in TOKENIZERS)}, and EnCodec, DAC and Mimi of transformers."
    )
