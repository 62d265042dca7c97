"""Datasets of latents: mels as an autoencoder encodes them, for training without the autoencoder in memory.

A row holds the posterior N(`latents`, `latents_std`^2) of a mel, shifted and scaled as the autoencoder's configuration
says, and all that the mel's row held besides. The record of the dataset is that of the mels, within one of the
autoencoder; the folder holds the autoencoder and the mel front end themselves.
"""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from huggingface_hub import snapshot_download

from tonefield.command_line import UserError, first_line
from tonefield.data.loading import DATASET_NOTE, RECORD_COLUMN, load_split, read_record, record_feature, split_names
from tonefield.files import replace_folder, set_aside, writing
from tonefield.hub import hub_errors, hub_reason
from tonefield.models.loading import check_complete, load_safely
from tonefield.models.mel_spectrogram import MelSpectrogram
from tonefield.training.checkpoints import CONTINUE, fingerprint_of
from tonefield.training.data import LATENT_COLUMNS, EndlessRows, ReadMels, TrainingData, open_split
from tonefield.training.publishing import settings_of


MEASURED_ROWS = 10_000  # more would change the third digit of a mean


def fingerprint(vae: AutoencoderKL) -> str:
    """Tells autoencoders apart: equal when the same latents mean the same mel."""
    return fingerprint_of(vae, vae.config.scaling_factor, vae.config.shift_factor)


def training_mels(data: TrainingData, size: int) -> Iterator[torch.Tensor]:
    """Batches of training mels: all, or `MEASURED_ROWS` from all over the dataset, or the first of a stream."""
    if isinstance(data.train, EndlessRows):
        rows = data.train.rows
        wanted = np.linspace(0, len(rows) - 1, min(len(rows), MEASURED_ROWS)).astype(int).tolist()
        batches = (rows[wanted[start : start + size]] for start in range(0, len(wanted), size))
    else:
        batches = itertools.islice(data.train.rows.iter(batch_size=size), -(-MEASURED_ROWS // size))
    for columns in batches:
        yield data.read(columns, [])["clean"]


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, accelerator: Accelerator, data: TrainingData, size: int) -> dict:
    """
    The mean and the standard deviation of draws from the posteriors of the training set, over all latents and for
    each channel: E[z] = E[mean], Var[z] = Var[mean] + E[std^2].
    """
    first = second = torch.zeros(vae.config.latent_channels, dtype=torch.float64)
    count = rows = 0
    for mels in training_mels(data, size):
        with accelerator.autocast():
            posterior = vae.encode(mels.to(accelerator.device)).latent_dist
        mean, var = posterior.mean.double(), posterior.var.double()
        first = first + mean.sum(dim=(0, 2, 3)).cpu()
        second = second + (mean.square() + var).sum(dim=(0, 2, 3)).cpu()
        count += mean[:, 0].numel()
        rows += len(mels)
    means, squares = first / count, second / count
    deviation = (squares.mean() - means.mean().square()).sqrt().item()
    if not 0 < deviation < float("inf"):
        raise UserError(f"The latents of the training set have the standard deviation {deviation}: train it anew.")
    return {
        "mean": means.mean().item(),
        "std": deviation,
        "channel_means": means.tolist(),
        "channel_stds": (squares - means.square()).sqrt().tolist(),
        "rows": rows,
    }


def autoencoder_of(folder: Path) -> str | None:
    """The fingerprint of what made a dataset of latents, if a folder holds one."""
    try:
        if not (folder / DATASET_NOTE).exists():
            return None
        return read_record(load_split(str(folder), split_names(str(folder))[0]).features)["vae"]["fingerprint"]
    except (UserError, OSError, ValueError, LookupError):
        return None


def written_by_this_run(args) -> bool:
    """Whether a start of this run that was killed has come so far as to write the latents."""
    try:
        flags = json.loads(Path(args.output_dir, "training.json").read_text(encoding="utf-8"))["flags"]
        same = args.resume_from_checkpoint and flags["cache_latents"] == args.cache_latents
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return bool(same) and autoencoder_of(Path(args.cache_latents)) is not None


def check_cache_folder(args) -> None:
    """Finds out before the training that there is a place for the latents, or that they are this run's own."""
    folder = Path(args.cache_latents)
    used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if used and not written_by_this_run(args):
        raise UserError(f"--cache_latents {folder} is in use: delete it or choose another one.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache_latents {folder} cannot be written: {error.strerror}.") from None


@torch.no_grad()
def cache_latents(args, accelerator: Accelerator, vae: AutoencoderKL, mel: MelSpectrogram, statistics: dict) -> None:
    """Writes the dataset of latents, all splits of it; under another name until it is complete. One that the same
    autoencoder has made is left as it is."""
    folder = Path(args.cache_latents).resolve()
    work = folder.with_name(f".{folder.name}.partial")
    for left in work, set_aside(folder):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    if autoencoder_of(folder) == fingerprint(vae):
        print(f"the latents are in {args.cache_latents} already")
        return
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    record = {
        "format": "tonefield-latents",
        "version": 1,
        "vae": {"fingerprint": fingerprint(vae), "config": settings_of(vae)},
        "statistics": statistics,
    }

    def encode(mels):
        mels = mel.standardize(torch.from_numpy(np.asarray(mels, dtype=np.float32)))
        with accelerator.autocast():
            posterior = vae.encode(mels.to(accelerator.device)).latent_dist
        scaled = (posterior.mean - shift) * scale, posterior.std * scale
        return {name: x.half().cpu().numpy() for name, x in zip(LATENT_COLUMNS, scaled, strict=True)}

    work.mkdir()
    try:
        splits = {}
        for split in split_names(args.dataset_name, args.dataset_config_name):
            rows = open_split(args, split)
            if split == args.train_split and args.max_train_samples is not None:
                rows = rows.select(range(min(args.max_train_samples, len(rows))))
            mels = read_record(rows.features)
            latents = datasets.Array3D(latent_shape(vae, mel), "float16")
            dropped = [name for name in ("mel", "image") if name in rows.features]
            features = {name: feature for name, feature in rows.features.items() if name not in dropped}
            features |= dict.fromkeys(LATENT_COLUMNS, latents)
            features[RECORD_COLUMN] = record_feature(record | {"mel": mels})
            splits[split] = rows.with_format("numpy").map(
                encode, batched=True, batch_size=args.train_batch_size, input_columns=["mel"],
                remove_columns=dropped,
                features=datasets.Features(features), new_fingerprint=f"{record['vae']['fingerprint']}{split}",
                cache_file_name=f"{work}/{split}.arrow", desc=f"latents of {split}",
            ).with_format(None)  # fmt: skip
        done = Path(work, "dataset")
        with writing(folder, CONTINUE):
            datasets.DatasetDict(splits).save_to_disk(done)
            vae.save_pretrained(done / "vae")
            mel.save_pretrained(done / "mel")
            replace_folder(done, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    counts = ", ".join(f"{len(rows)} {split}" for split, rows in splits.items())
    print(f"the latents are in {args.cache_latents}: {counts}")


def latent_shape(vae: AutoencoderKL, mel: MelSpectrogram) -> tuple[int, int, int]:
    """Channels, height and width of the latents of one slice."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.latent_channels, mel.config.n_mels // factor, mel.config.num_frames // factor


def open_vae(name: str) -> tuple[AutoencoderKL, MelSpectrogram | None]:
    """
    An autoencoder that is not trained, and its front end if it comes with one: a folder or a Hub id that holds both in
    `vae` and `mel`, as train_vae.py writes them, or an autoencoder alone.
    """

    def load(cls, subfolder: str | None):
        if subfolder and Path(name).exists() and not Path(name, subfolder).is_dir():
            raise OSError  # diffusers would take what lies one folder above
        model = load_safely(cls.from_pretrained, name, subfolder=subfolder, use_safetensors=True)
        check_complete(model, subfolder or name, subfolder)
        return model

    vae = mel = None
    try:
        vae = load(AutoencoderKL, "vae")
        mel = load(MelSpectrogram, "mel")
    except OSError as error:
        if vae is None and Path(name, "vae").is_dir():
            raise UserError(f"--vae {name} cannot be loaded: {first_line(error)}") from None
    except ValueError as error:
        raise UserError(f"--vae {name} cannot be loaded: {first_line(error)}") from None
    try:
        vae = vae or load(AutoencoderKL, None)
    except hub_errors() as error:
        raise UserError(f"--vae {name} cannot be loaded: {hub_reason(error)}") from None
    return vae.requires_grad_(False).eval(), mel


def open_vae_of_latents(args, data: TrainingData, vae: AutoencoderKL | None = None) -> AutoencoderKL:
    """The autoencoder that lies within a dataset of latents, here or on the Hub, or that --vae names, or that of the
    pipeline that is trained on: the one that made the latents, or it is refused."""
    name, wanted = args.vae or args.dataset_name, data.vae["fingerprint"]
    if vae is not None:
        name = args.from_pretrained
    else:
        try:
            if args.vae is None and not Path(name).exists():
                name = snapshot_download(name, repo_type="dataset", allow_patterns=["vae/*", "mel/*"])
            vae, _ = open_vae(name)
        except (UserError, OSError, ValueError) as error:
            if args.vae is not None:
                raise
            raise UserError(
                f"{args.dataset_name} comes without its autoencoder, name it with --vae: {first_line(error)}"
            ) from None
    if fingerprint(vae) != wanted:
        raise UserError(
            f"The autoencoder in {name} is {fingerprint(vae)}, the latents of {args.dataset_name} were made by"
            f" {wanted}: give that one, or make the latents again (train_vae.py --cache_latents)."
        )
    return vae


def adopt_front_end(args, data: TrainingData, front_end: MelSpectrogram, origin: str) -> None:
    """Has mels be read with the mean and the spread that a trained network knows; refuses other mels."""
    mel = data.mel
    assert mel is not None
    if front_end.fingerprint() != mel.fingerprint():
        ours, theirs = settings_of(mel), settings_of(front_end)
        different = [n for n in ours if n not in ("mean", "std", "num_frames") and ours[n] != theirs.get(n)]
        raise UserError(
            f"{origin} was trained on other mels than those of {args.dataset_name}: "
            + ", ".join(f"{name} {theirs.get(name)}, not {ours[name]}" for name in different)
            + ". Train an autoencoder on these (train_vae.py)." * (origin == f"--vae {args.vae}")
        )
    scale = {name: front_end.config[name] for name in ("mean", "std")}
    data.mel = MelSpectrogram(**settings_of(mel) | scale)
    if isinstance(data.read, ReadMels):
        data.read = data.train.read = ReadMels(data.mel, data.read.class_column)


def encode_on_the_fly(
    args, data: TrainingData, vae: AutoencoderKL | None = None, front_end: MelSpectrogram | None = None
) -> AutoencoderKL:
    """Has a dataset of mels be trained on as the latents of --vae, or of the pipeline that is trained on:
    `draw_latents` then makes them."""
    origin = f"--from_pretrained {args.from_pretrained}"
    if vae is None:
        origin = f"--vae {args.vae}"
        vae, front_end = open_vae(args.vae)
    if front_end is not None:
        adopt_front_end(args, data, front_end, origin)
    mel = data.mel
    assert mel is not None
    if vae.config.in_channels != 1:
        raise UserError(f"{origin} encodes {vae.config.in_channels} channels, a mel has one.")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = data.sample_shape[1:]
    if height % factor or width % factor:
        raise UserError(
            f"{origin} halves mels {factor.bit_length() - 1} times, which {height} x {width} (bands x frames)"
            f" does not allow: make a dataset of multiples of {factor} (audio_to_images.py --resolution)."
        )
    data.sample_shape, data.sigma_data = latent_shape(vae, mel), 1.0
    data.vae = {"fingerprint": fingerprint(vae), "config": settings_of(vae)}
    data.read = data.train.read = ReadMels(mel, data.read.class_column, data.sample_shape, args.seed)
    return vae


@torch.no_grad()
def draw_latents(vae: AutoencoderKL, mels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draws from the posteriors of mels, of mean 0 and deviation 1 as the network sees them."""
    posterior = vae.encode(mels).latent_dist
    draws = posterior.mean.float() + posterior.std.float() * noise
    return (draws - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
