"""Training that goes on from a pipeline: what it knows is not told again, and the data must fit it."""

import math
from typing import Any

import tonefield
from tonefield.command_line import UserError, first_line
from tonefield.models.mel_spectrogram import MelSpectrogram
from tonefield.schedulers import PoissonFlowScheduler, ScoreSDEScheduler
from tonefield.training.data import ReadLatents, TrainingData
from tonefield.training.latents import adopt_front_end


def open_pretrained(args) -> Any:
    """The pipeline that --from_pretrained names. Sets the objective in `args`, and that there are no classes if it
    knows none."""
    name = args.from_pretrained
    try:
        pipeline: Any = tonefield.load(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--from_pretrained {name} cannot be loaded: {first_line(error)}") from None
    if not hasattr(pipeline, "unet"):
        raise UserError(f"--from_pretrained {name} holds a {type(pipeline).__name__}, which has no U-Net.")
    for part in (pipeline.vae, pipeline.text_encoder) if hasattr(pipeline, "vae") else ():
        if part is not None:
            part.requires_grad_(False).eval()
    args.objective = objective_of(pipeline.scheduler, name)
    if args.objective in ("pfgmpp", "field"):
        args.aug_dim = math.inf if pipeline.scheduler.config.aug_dim is None else pipeline.scheduler.config.aug_dim
    if not pipeline.unet.config.get("num_class_embeds"):
        args.class_conditional = False
    return pipeline


def objective_of(scheduler, name: str) -> str:
    """What the network of a pipeline was trained for."""
    c = scheduler.config
    if isinstance(scheduler, ScoreSDEScheduler):
        return c.sde
    kind = c.get("prediction_type")
    if isinstance(scheduler, PoissonFlowScheduler):
        found = {"edm": "pfgmpp", "field": "field"}.get(kind)
    else:
        trains = hasattr(scheduler, "alphas_cumprod") and hasattr(scheduler, "get_velocity")
        found = kind if trains and kind in ("epsilon", "v_prediction") else None
    if found is None:
        raise UserError(
            f"--from_pretrained {name}: a network cannot be trained with {type(scheduler).__name__} ({kind}). Save the"
            " pipeline with a DDPMScheduler, a DDIMScheduler, a PoissonFlowScheduler or a ScoreSDEScheduler."
        )
    return found


def fit_data(args, data: TrainingData, pipeline) -> None:
    """Has the data be seen as the pipeline's network has seen its own; refuses what it cannot be trained on."""
    name, front_end = f"--from_pretrained {args.from_pretrained}", pipeline.mel
    if (front_end is None) != (data.mel is None):
        ours, theirs = ("mels", "pictures") if front_end is None else ("pictures", "mels")
        raise UserError(f"{name} was trained on {theirs}, {args.dataset_name} holds {ours}.")
    if isinstance(data.read, ReadLatents) and getattr(pipeline, "vae", None) is None:
        raise UserError(f"{name} works on mels without an autoencoder, {args.dataset_name} holds latents.")
    count = (pipeline.unet.config.get("num_class_embeds") or 1) - 1
    classes = list(pipeline.config.get("label2id") or map(str, range(count)))
    if classes != data.class_names:
        given, known = (", ".join(names) or "no classes" for names in (data.class_names, classes))
        raise UserError(f"{name} knows {known}, {args.dataset_name} has {given}: they must be equal.")
    if isinstance(front_end, MelSpectrogram) and data.mel is not None:
        ours, theirs = data.mel.config.num_frames, front_end.config.num_frames
        if ours != theirs:
            raise UserError(f"{name} makes sounds of {theirs} frames, those of {args.dataset_name} have {ours}.")
        adopt_front_end(args, data, front_end, name)


def check_shape(args, data: TrainingData, unet) -> None:
    """What the network takes and what the data, latents by now if there is an autoencoder, has."""
    channels, *size = data.sample_shape
    wanted = unet.config.get("sample_size") or size
    wanted = [wanted, wanted] if isinstance(wanted, int) else list(wanted)
    if (unet.config.in_channels, wanted) != (channels, size):
        shape = "x".join(map(str, (unet.config.in_channels, *wanted)))
        raise UserError(
            f"--from_pretrained {args.from_pretrained} takes samples of {shape}, those of {args.dataset_name} are"
            f" {'x'.join(map(str, data.sample_shape))}."
        )
