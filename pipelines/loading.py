"""One call that loads whichever of tonefield's pipelines a repository holds."""

import inspect
import os
from typing import Any

import diffusers
from diffusers import ConfigMixin, DiffusionPipeline

import tonefield
from tonefield.models import load_vocoder


# What both reading the index and loading the pipeline want to know about a repository.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class _AudioDiffusionMel(ConfigMixin):
    config_name = "mel_config.json"


def load_audio_diffusion(name: str, config: dict, **kwargs):
    """
    A pipeline of the deprecated class `AudioDiffusionPipeline` of diffusers, as a [`LatentAudioDiffusionPipeline`].

    Its mels are decibels below the loudest bin of each slice. Its scheduler clips what it denoises, which is right for
    mels; in the space of latents that is switched off.

    Args:
        name (`str`): Repository id on the Hub, or folder.
        config (`dict`): Its model_index.json.
        kwargs: What `from_pretrained` of the components takes.
    """
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    mel: Any = _AudioDiffusionMel.load_config(name, subfolder="mel", **hub)
    front_end = tonefield.MelSpectrogram(
        sample_rate=mel["sample_rate"], n_fft=mel["n_fft"], hop_length=mel["hop_length"], n_mels=mel["y_res"],
        num_frames=mel["x_res"], top_db=mel["top_db"], ref="slice",
    )  # fmt: skip
    unet = getattr(diffusers, config["unet"][1]).from_pretrained(name, subfolder="unet", **kwargs)
    scheduler_class, vae = getattr(diffusers, config["scheduler"][1]), None
    if (config.get("vqvae") or [None])[-1] is not None:
        vae = diffusers.AutoencoderKL.from_pretrained(name, subfolder="vqvae", **kwargs)
    scheduler_config = scheduler_class.load_config(name, subfolder="scheduler", **hub)
    scheduler = scheduler_class.from_config(scheduler_config, **({"clip_sample": False} if vae is not None else {}))
    return tonefield.LatentAudioDiffusionPipeline(unet, scheduler, front_end, vae)


def load(pretrained_model_name_or_path: str | os.PathLike, **kwargs):
    """
    Load a pipeline of tonefield from the Hub or from a folder, without running any code of the repository.

    What `AudioDiffusionPipeline` of diffusers has saved loads as a [`LatentAudioDiffusionPipeline`].

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
    except OSError as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{name} is neither a folder nor a pipeline on the Hub that can be read: {reason}") from error
    class_name = config["_class_name"]
    class_name = class_name[-1] if isinstance(class_name, list) else class_name
    if class_name == "AudioDiffusionPipeline":
        return load_audio_diffusion(name, config, **kwargs)
    cls = getattr(tonefield, class_name) if class_name in dir(tonefield) else None
    if not (inspect.isclass(cls) and issubclass(cls, DiffusionPipeline)):
        raise ValueError(
            f"{name} holds a {class_name}, which is no pipeline of tonefield {tonefield.__version__}: load it with"
            " diffusers.DiffusionPipeline.from_pretrained."
        )
    return cls.from_pretrained(name, **kwargs)
