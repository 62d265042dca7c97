"""One call that loads whichever of tonefield's pipelines a repository holds."""

import inspect
import os
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub.errors import HTTPError

import tonefield
from tonefield.conversion.audio_diffusion import HUB_ARGUMENTS, convert_audio_diffusion
from tonefield.hub import hub_reason
from tonefield.models import load_vocoder
from tonefield.models.loading import check_complete, load_safely


def load(pretrained_model_name_or_path: str | os.PathLike, **kwargs):
    """
    Load a pipeline of tonefield from the Hub or from a folder, without running any code of the repository. Its
    weights must be safetensors, and all there.

    What `AudioDiffusionPipeline` of diffusers has saved loads as a [`LatentAudioDiffusionPipeline`], see
    [`convert_audio_diffusion`](tonefield.conversion.convert_audio_diffusion), whose arguments may be given as well.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`): Repository id on the Hub, or folder.
        kwargs: What `from_pretrained` of the pipeline takes: `dtype`, `revision`, `token`, `variant`, components, ...
            A `vocoder` may be given by name, see [`load_vocoder`](tonefield.models.load_vocoder).

    Returns:
        The pipeline, an instance of the class that the repository names.

    Example:
        ```py
        pipe = tonefield.load("someone/drum-loops")
        sound = pipe(generator=torch.Generator().manual_seed(0)).audios[0]

        pipe = tonefield.load("someone/songs", vocoder="nvidia/bigvgan_v2_44khz_128band_256x")
        ```
    """
    if isinstance(kwargs.get("vocoder"), (str, os.PathLike)):
        place = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs and key != "revision"}
        kwargs["vocoder"] = load_vocoder(kwargs["vocoder"], **place)
    name = os.fspath(pretrained_model_name_or_path)
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, DiffusionPipeline.config_name)):
        raise FileNotFoundError(f"The folder {name} holds no {DiffusionPipeline.config_name}: it is not a pipeline's.")
    try:
        config: Any = DiffusionPipeline.load_config(name, **{k: kwargs[k] for k in HUB_ARGUMENTS if k in kwargs})
    except (OSError, HTTPError, RecursionError) as error:
        raise OSError(
            f"{name} is neither a folder nor a pipeline on the Hub that can be read: {hub_reason(error)}"
        ) from error
    if not isinstance(config, dict) or not config.get("_class_name"):
        raise ValueError(f"The {DiffusionPipeline.config_name} of {name} names no pipeline.")
    class_name = config["_class_name"]
    class_name = class_name[-1] if isinstance(class_name, list) else class_name
    cls: Any = getattr(tonefield, class_name) if class_name in dir(tonefield) else None
    foreign = class_name == "AudioDiffusionPipeline" or "vqvae" in config  # whatever it was named
    if not foreign and not (inspect.isclass(cls) and issubclass(cls, DiffusionPipeline)):
        raise ValueError(
            f"{name} holds a {class_name}, which is no pipeline of tonefield {tonefield.__version__}: load it with"
            " diffusers.DiffusionPipeline.from_pretrained."
        )
    try:
        if foreign:
            return convert_audio_diffusion(name, **kwargs)
        pipe = load_safely(cls.from_pretrained, name, **{"use_safetensors": True, **kwargs})
    except HTTPError as error:
        raise OSError(
            f"{name} has not been downloaded whole: {hub_reason(error)}. Load it again: what has arrived is kept."
        ) from error
    for part, component in pipe.components.items():
        if part not in kwargs:
            check_complete(component, f"the {part} of {name}")
    return pipe
