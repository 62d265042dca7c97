"""Pipelines driven by the flags of `inference.py`, for command line and page; a flag without a use is refused."""

import argparse
import hashlib
import inspect
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tonefield.command_line import UserError, first_line


PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"
DEFAULT_MODEL = PRETRAINED / "digits-poisson-flow"

# The schedulers of diffusers by the names of their methods, for models that were trained with any of them.
SOLVERS = {
    "ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "deis": "DEISMultistepScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler", "heun": "HeunDiscreteScheduler",
    "pndm": "PNDMScheduler", "unipc": "UniPCMultistepScheduler",
}  # fmt: skip

# Flags that are arguments of a pipeline's call. A pipeline without that argument has no use for the flag.
ARGUMENTS = {
    "prompt": "prompt", "negative_prompt": "negative_prompt", "class_label": "class_labels",
    "steps": "num_inference_steps", "guidance_scale": "guidance_scale", "seconds": "audio_length_in_s",
    "strength": "strength", "temperature": "temperature", "eta": "eta", "loop": "loop",
}  # fmt: skip


# ----- the model


def load_model(args: argparse.Namespace):
    """The pipeline as the flags want it, on this process's device."""
    from accelerate import PartialState

    import tonefield
    from tonefield.schedulers import ScoreEntropyScheduler

    name = args.model or str(DEFAULT_MODEL)
    if args.model is None and not DEFAULT_MODEL.is_dir():
        raise UserError(f"The models that come with the repository are not in {PRETRAINED}: name one with --model.")
    try:
        pipe = tonefield.load(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name} cannot be loaded: {first_line(error)}") from None
    if pipe.components.get("mel") is None and pipe.components.get("audio_tokenizer") is None:
        what = ".tokens" if hasattr(pipe, "transformer") else ".images"
        raise UserError(f"--model {name} makes no sound: from Python, tonefield.load({name!r})() returns {what}.")
    if args.vocoder:
        if "vocoder" not in pipe.components:
            refuse(pipe, "vocoder", "its codec makes the sound")
        try:
            pipe.register_modules(vocoder=tonefield.models.load_vocoder(args.vocoder))
        except (OSError, ValueError) as error:
            raise UserError(f"--vocoder {args.vocoder} cannot be loaded: {first_line(error)}") from None
    if args.n_iter:
        if getattr(pipe, "mel", None) is None or pipe.components.get("vocoder") is not None:
            refuse(pipe, "n_iter", "it does not use Griffin-Lim")
        pipe.mel.register_to_config(n_iter=args.n_iter)
    if args.solver:
        pipe.register_modules(scheduler=change_solver(pipe.scheduler, args.solver))
    if args.temperature is not None and isinstance(pipe.scheduler, ScoreEntropyScheduler):
        scheduler = pipe.scheduler
        pipe.register_modules(scheduler=type(scheduler).from_config(scheduler.config, temperature=args.temperature))
    return pipe.to(PartialState().device)


def change_solver(scheduler, solver: str):
    """A scheduler of the same noise that makes its steps in another way."""
    import diffusers

    from tonefield.schedulers import PoissonFlowScheduler, ScoreEntropyScheduler, ScoreSDEScheduler

    cls, changes = type(scheduler), {}
    if isinstance(scheduler, ScoreEntropyScheduler):
        changes = {"predictor": solver}
    elif isinstance(scheduler, (PoissonFlowScheduler, ScoreSDEScheduler)):
        changes = {"solver_type": solver}
    elif solver in SOLVERS:
        cls = getattr(diffusers, SOLVERS[solver])
    else:
        raise UserError(f"--solver {solver} is none of {', '.join(SOLVERS)}, which diffusion knows.")
    try:
        return cls.from_config(scheduler.config, **changes)
    except ValueError as error:
        raise UserError(f"--solver {solver}: {first_line(error)}") from None


def refuse(pipe, flag: str, why: str) -> None:
    raise UserError(f"--{flag} is of no use to this {type(pipe).__name__}: {why}.")


def model_fingerprint(pipe) -> str:
    """Tells models apart: equal when all weights and settings are."""
    from tonefield.training.checkpoints import fingerprint_of

    digest = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        if hasattr(component, "state_dict") and hasattr(component, "parameters"):
            digest.update(f"{name} {fingerprint_of(component)}".encode())
        settings = component.config if hasattr(component, "register_to_config") else {}
        settings = {key: value for key, value in settings.items() if not key.startswith("_")}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def sampling_rate_of(pipe) -> int:
    return pipe.mel.config.sample_rate if hasattr(pipe, "mel") else pipe.audio_tokenizer.sampling_rate


# ----- what it is told


@dataclass
class Sound:
    """One sound of a run: its place, its seed, and what it is told."""

    index: int
    seed: int
    prompt: str | None = None
    class_label: str | None = None

    @property
    def title(self) -> str:
        return self.prompt or self.class_label or f"seed {self.seed}"


def make_call(pipe, args: argparse.Namespace, sounds: Sequence[Sound]) -> dict[str, Any]:
    """The arguments of the pipeline's call that all sounds share; refuses flags that it has no use for."""
    known = inspect.signature(pipe.__call__).parameters
    call: dict[str, Any] = {}
    for flag, argument in ARGUMENTS.items():
        value = getattr(args, flag)
        if value is None or (flag == "temperature" and "temperature" in getattr(pipe.scheduler, "config", {})):
            continue
        if argument not in known:
            refuse(pipe, flag, f"sounds of {window_seconds(pipe):.2f} s are what it makes" if flag == "seconds"
                   else f"it has no {argument}")  # fmt: skip
        if flag not in ("prompt", "class_label"):
            call[argument] = value
    told = sounds[0].prompt is not None or sounds[0].class_label is not None
    if args.guidance_scale is None and told:
        call["guidance_scale"] = 3.0
    return call | given_audio(pipe, args, known)


def window_seconds(pipe) -> float:
    """How long the sounds are that the network was trained on."""
    if hasattr(pipe, "mel"):
        return pipe.mel.slice_samples / pipe.mel.config.sample_rate
    longest = pipe.transformer.config.max_length
    return float("inf") if longest is None else longest * pipe.audio_tokenizer.hop_length / sampling_rate_of(pipe)


def given_audio(pipe, args: argparse.Namespace, known) -> dict[str, Any]:
    """The arguments that --audio, --inpaint, --continue_to and the length of a sound lead to."""
    import numpy as np

    from tonefield.data.audio_files import AudioError, read_audio

    rate, call = sampling_rate_of(pipe), {}
    seconds = args.continue_to or args.seconds
    if "overlap_in_s" in known and seconds and seconds > window_seconds(pipe):
        call["overlap_in_s"] = window_seconds(pipe) / 2
    if args.audio is None:
        return call
    try:
        audio = read_audio(Path(args.audio), rate)
    except (AudioError, OSError) as error:
        raise UserError(f"--audio {args.audio} cannot be used: {first_line(error)}") from None
    length = len(audio) / rate
    for start, end in args.inpaint or []:
        if end > length:
            raise UserError(f"--inpaint {start:g}:{end:g} ends after {args.audio}, which is {length:.2f} s long.")
    if args.continue_to is not None and args.continue_to <= length:
        raise UserError(
            f"--continue_to {args.continue_to:g} is not beyond {args.audio}, which is {length:.2f} s long."
        )
    spans = list(args.inpaint or [])
    if "audio_length_in_s" in known:
        if args.continue_to:
            call["audio_length_in_s"] = args.continue_to
        if "continuous" in known and args.continue_to and args.continue_to > window_seconds(pipe):
            call["continuous"] = True
    else:  # one length only: silence follows a shorter sound, as in training
        whole = pipe.mel.slice_samples if not args.loop else pipe.mel.config.num_frames * pipe.mel.config.hop_length
        if max(length, args.continue_to or 0) * rate > whole + 1:
            flag = (
                f"--continue_to {args.continue_to:g}" if args.continue_to else f"--audio {args.audio} ({length:.2f} s)"
            )
            raise UserError(f"{flag} is longer than what this {type(pipe).__name__} makes, {whole / rate:.2f} s.")
        if args.continue_to:
            spans.append((length, args.continue_to))
        audio = np.pad(audio, (0, whole - len(audio)))
    call["audio"] = audio
    return call | ({"mask": spans} if spans else {})


# ----- making it


def seeded(sounds: Sequence[Sound]) -> list:
    import torch

    return [torch.Generator().manual_seed(sound.seed) for sound in sounds]


def make_batch(pipe, call: dict[str, Any], sounds: Sequence[Sound]):
    """The waveforms (count, samples) of one batch; each depends on its own seed only."""
    conditions: dict[str, Any] = {}
    if sounds[0].prompt is not None:
        conditions["prompt"] = [sound.prompt for sound in sounds]
    if sounds[0].class_label is not None:
        names = pipe.config.label2id or {}
        labels = [sound.class_label or "" for sound in sounds]
        conditions["class_labels"] = [label if label in names else int(label) for label in labels]
    if not conditions.get("prompt"):
        conditions |= count_argument(pipe, len(sounds))
    return pipe(**call, **conditions, generator=seeded(sounds)).audios


def count_argument(pipe, count: int) -> dict[str, int]:
    name = "batch_size" if "batch_size" in inspect.signature(pipe.__call__).parameters else "num_waveforms_per_prompt"
    return {name: count}


def make_path(pipe, args: argparse.Namespace, call: dict[str, Any], sounds: Sequence[Sound]):
    """The waveforms from A to B: through the noise of two seeds, or through that of two sounds."""
    import torch

    from tonefield.pipelines.tonefield_mel_editing import interpolate_latents

    if not hasattr(pipe, "interpolate"):
        refuse(pipe, "interpolate", "there is nothing between two tokens")
    a, b, _ = args.interpolate
    told: dict[str, Any] = {"prompt": sounds[0].prompt} if sounds[0].prompt else {}
    if sounds[0].class_label is not None:
        named = sounds[0].class_label in (pipe.config.label2id or {})
        told["class_labels"] = sounds[0].class_label if named else int(sounds[0].class_label)
    if a.isdigit() and b.isdigit():
        width = () if "batch_size" in count_argument(pipe, 1) else (pipe._window,)
        start, end = (pipe.prepare_noise(1, *width, torch.Generator().manual_seed(int(seed))) for seed in (a, b))
        path = interpolate_latents(start, end, torch.linspace(0, 1, len(sounds), dtype=torch.float64))
        return pipe(**call, **told, latents=path, generator=seeded(sounds)).audios
    for end in (a, b):
        if not os.path.exists(end):
            raise UserError(f"--interpolate {end} is neither a seed nor a sound file.")
    takes = inspect.signature(pipe.interpolate).parameters
    for flag, argument in ARGUMENTS.items():
        if argument in call and argument not in takes and getattr(args, flag) is not None:
            refuse(pipe, flag, "its way between two sounds has no such thing")
    call = {argument: value for argument, value in call.items() if argument in takes}
    known = inspect.signature(pipe.__call__).parameters
    ends = [given_audio(pipe, argparse.Namespace(**{**vars(args), "audio": end}), known)["audio"] for end in (a, b)]
    return pipe.interpolate(*ends, len(sounds), **told, **call, generator=seeded(sounds)).audios
