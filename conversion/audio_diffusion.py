"""Bring a pipeline of audio-diffusion (teticio/*, and of forks of it) into a LatentAudioDiffusionPipeline.

    python -m tonefield.conversion.audio_diffusion teticio/latent-audio-diffusion-256 models/latent-256
    python -m tonefield.conversion.audio_diffusion runs/sleep/model_step_100000 models/sleep \\
        --bigvgan_model bigvgan_v2_44khz_128band_256x

IN is a name on the Hub or a folder, as `AudioDiffusionPipeline.save_pretrained` writes it. Networks on mels and on the
latents of an autoencoder come in, with encodings or without. Nothing has to be converted to be used:
`tonefield.load("teticio/latent-audio-diffusion-256")` does the same.

- The mels are pictures of decibels below the loudest bin of each slice, so that sound comes back at a peak of 0.95.
  Networks that were trained on the mels of a BigVGAN do not say so: name it with --bigvgan_model.
- Networks with encodings read `prompt_embeds`, of shape (sounds, 1, width) as they were trained: the 100 numbers of an
  audio encoder, or T5's state of the first token of the genres. The encoders are no part of these pipelines.
- A scheduler that clips what it denoises does so on mels; in the space of latents that is switched off.
"""

import argparse
import os
from typing import TYPE_CHECKING, Any

from tonefield.command_line import UserError, first_line
from tonefield.conversion.command import find_source, importer_parser, run_importer


if TYPE_CHECKING:
    from tonefield import LatentAudioDiffusionPipeline, MelSpectrogram

# What reading a configuration wants to know about a repository.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
COMPONENTS = ("unet", "scheduler", "mel", "vae", "vocoder")

# What a mel has where its configuration does not say: the defaults of audio-diffusion.
MEL = dict(x_res=256, y_res=256, sample_rate=22050, n_fft=2048, hop_length=512, top_db=80)


def front_end(config: dict[str, Any], bigvgan_model: str | None) -> "MelSpectrogram":
    """The mels that a network was trained on: 8-bit pictures relative to the loudest bin of each, or a BigVGAN's."""
    from tonefield import MelSpectrogram

    c = MEL | {key: config[key] for key in MEL if key in config}
    if bigvgan_model is None:
        return MelSpectrogram(
            sample_rate=c["sample_rate"], n_fft=c["n_fft"], hop_length=c["hop_length"], n_mels=c["y_res"],
            num_frames=c["x_res"], top_db=c["top_db"], ref="slice",
        )  # fmt: skip
    mel = MelSpectrogram.from_preset(bigvgan_model.removeprefix("nvidia/"), num_frames=c["x_res"])
    if mel.config.method != "bigvgan" or mel.config.n_mels != c["y_res"]:
        raise ValueError(
            f"The network was trained on mels of {c['y_res']} bands, but {bigvgan_model} has {mel.config.n_mels}"
            f" of the method {mel.config.method!r}: name the BigVGAN that its mels were made for."
        )
    return mel


def convert_audio_diffusion(
    name: str | os.PathLike, bigvgan_model: str | None = None, **kwargs
) -> "LatentAudioDiffusionPipeline":
    """
    A pipeline of the class `AudioDiffusionPipeline` as a [`LatentAudioDiffusionPipeline`].

    Args:
        name (`str` or `os.PathLike`): Repository id on the Hub, or folder.
        bigvgan_model (`str`, *optional*): The vocoder on whose mels the network was trained, if on any's.
        kwargs: What `from_pretrained` takes: components to use in the place of its own (`unet`, `scheduler`, `mel`,
            `vae`, `vocoder`), and what the `from_pretrained` of components takes.
    """
    import diffusers
    from diffusers import ConfigMixin, DiffusionPipeline

    from tonefield import LatentAudioDiffusionPipeline

    class Mel(ConfigMixin):
        config_name = "mel_config.json"

    name, given = os.fspath(name), {key: kwargs.pop(key) for key in COMPONENTS if key in kwargs}
    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    index: Any = DiffusionPipeline.load_config(name, **hub)

    def component(part: str, kinds: tuple[type, ...]) -> Any:
        class_name = (index.get(part) or [None])[-1]
        cls = getattr(diffusers, str(class_name), None)
        if not (isinstance(cls, type) and issubclass(cls, kinds)):
            raise ValueError(f"{name} has a {class_name} as its {part}, which audio-diffusion does not know.")
        return cls

    def weights(part: str, *kinds: type) -> Any:
        model, info = component(part, kinds).from_pretrained(name, subfolder=part, output_loading_info=True, **kwargs)
        for what in ("missing", "unexpected"):
            if keys := sorted(info[f"{what}_keys"]):
                raise ValueError(f"{name}: {len(keys)} tensors of the {part} are {what}, the first is {keys[0]}.")
        return model

    if "unet" not in given:
        given["unet"] = weights("unet", diffusers.UNet2DModel, diffusers.UNet2DConditionModel)
    if "vae" not in given:
        has_vae = (index.get("vqvae") or [None])[-1] is not None
        given["vae"] = weights("vqvae", diffusers.AutoencoderKL) if has_vae else None
    if "scheduler" not in given:
        cls = component("scheduler", (diffusers.SchedulerMixin,))
        unclipped = {"clip_sample": False} if given["vae"] is not None else {}
        given["scheduler"] = cls.from_config(cls.load_config(name, subfolder="scheduler", **hub), **unclipped)
    if "mel" not in given:
        settings: Any = Mel.load_config(name, subfolder="mel", **hub)
        given["mel"] = front_end(settings, bigvgan_model)
    return LatentAudioDiffusionPipeline(**given)


def convert(args: argparse.Namespace) -> "LatentAudioDiffusionPipeline":
    folder = find_source(args.source, ["model_index.json", "unet/*", "vqvae/*", "mel/*", "scheduler/*"])
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{args.source} holds no model_index.json: it is no folder of a pipeline.")
    try:
        return convert_audio_diffusion(folder, args.bigvgan_model)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{args.source} cannot be brought in: {first_line(error)}") from None


if __name__ == "__main__":
    parser = importer_parser(__doc__)
    parser.add_argument(
        "--bigvgan_model",
        metavar="NAME",
        help="the vocoder on whose mels the network was trained (one of the presets)",
    )
    run_importer(convert, parser)
