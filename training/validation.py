"""What a network in training makes, where a person can look and listen: pictures and sounds in files and trackers."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from tonefield.data.pictures import draw_mels, draw_sounds
from tonefield.files import write_sound
from tonefield.models.mel_spectrogram import MelSpectrogram
from tonefield.training.data import TrainingData
from tonefield.training.randomness import make_generators


SHOWN = 16  # sounds in a picture and in a tracker; all are written


@torch.no_grad()
def draw_samples(
    unet: torch.nn.Module,
    scheduler,
    shape: tuple[int, int, int],
    count: int,
    num_inference_steps: int,
    seed: int,
    class_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Samples of a network, by diffusers' loop with any of our schedulers. Sample i depends on its seed alone."""
    device = next(unet.parameters()).device
    scheduler = type(scheduler).from_config(scheduler.config)  # the run of another leaves no trace in this one
    scheduler.set_timesteps(num_inference_steps, device)
    generators = make_generators(seed, "sample", list(range(count)), device)
    draw = getattr(scheduler, "sample_noise", randn_tensor)
    sample = draw((count, *shape), generator=generators, device=device) * scheduler.init_noise_sigma
    labels = {} if class_labels is None else {"class_labels": class_labels.to(device)}
    for t in scheduler.timesteps:
        output = unet(scheduler.scale_model_input(sample, t), t.expand(count), **labels).sample
        sample = scheduler.step(output, t, sample, generator=generators).prev_sample
    return sample


def spread_labels(count: int, num_classes: int) -> torch.Tensor | None:
    """One label a sample, as many different ones as can be."""
    return torch.arange(count) * max(1, num_classes // max(1, count)) % num_classes if num_classes else None


def with_metrics(
    args,
    accelerator,
    generate: Callable[[torch.nn.Module, int], dict[str, float] | None] | None,
    held_out: Callable[[], tuple[Iterable[np.ndarray], int]],
    every: int = 1,
) -> Callable[[torch.nn.Module, int], dict[str, float] | None] | None:
    """
    `generate` of the training loop, and after it the distances of the sounds that it has written to those held out.

    Args:
        held_out: The sounds that are held out, and their rate; called once.
        every: Which of the sounds are the network's: all of them, or every second one.
    """
    if not args.validation_metrics or generate is None:
        return generate

    from tonefield.evaluation import AudioSet, evaluate, load_embedding

    device = str(accelerator.device)
    embedding = load_embedding(args.validation_embedding, device)
    sets: list[AudioSet] = []

    def generate_and_measure(network: torch.nn.Module, step: int) -> dict[str, float]:
        values = generate(network, step) or {}
        if not sets:
            real, rate = held_out()
            sets.append(AudioSet.of(list(real), rate, "held out"))
        folder, name = Path(args.output_dir, "samples"), f"step-{step:07d}"
        indices = range(every - 1, args.num_validation_samples * every, every)
        files = [file for index in indices if (file := folder / f"{name}-{index}.wav").is_file()]
        sounds = [soundfile.read(file, dtype="float32")[0] for file in files]
        made = AudioSet.of(sounds, soundfile.info(files[0]).samplerate, name)
        report = evaluate(sets[0], made, args.validation_metrics, [embedding], device=device, bootstrap=0)
        return values | {f"validation_{result['metric']}": result["value"] for result in report["results"]}

    return generate_and_measure


@torch.no_grad()
def held_out_mels(
    data: TrainingData, size: int, to_mels: Callable[[dict], torch.Tensor] | None = None
) -> tuple[list[np.ndarray], int]:
    """The sounds of the held-out mels, made audible as those of a network are."""
    assert data.mel is not None
    generator, sounds = torch.Generator().manual_seed(0), []
    for batch in data.validation_batches(size):
        mels = batch["clean"] if to_mels is None else to_mels(batch)
        sounds += list(data.mel.decode(mels.float().cpu(), generator=generator).clamp(-1, 1).numpy())
    return sounds, data.mel.config.sample_rate


def show_samples(
    samples: torch.Tensor, data: TrainingData, labels: torch.Tensor | None, folder: Path, step: int, trackers: list
) -> None:
    """Writes `step-<step>.png`, for mels also their sounds, and hands both to the trackers."""
    folder.mkdir(parents=True, exist_ok=True)
    titles = [data.class_names[label] for label in labels.tolist()] if labels is not None else []
    if data.mel is not None:
        show_mels(samples, data.mel, folder, step, trackers, titles)
        return
    picture = folder / f"step-{step:07d}.png"
    pixels = ((samples.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    Image.fromarray(np.concatenate([row.squeeze(-1) if row.shape[-1] == 1 else row for row in pixels], 1)).save(
        picture
    )
    for tracker in trackers:
        track(tracker, picture, [], 0, step)


def show_mels(
    mels: torch.Tensor,
    front_end: MelSpectrogram,
    folder: Path,
    step: int,
    trackers: list,
    titles: Sequence[str] = (),
) -> None:
    """Writes `step-<step>.png` and a sound for each mel, and hands all to the trackers."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"step-{step:07d}.png"
    mels = mels.float().cpu()
    draw_mels(mels[:SHOWN], front_end, picture, titles)
    generator = torch.Generator().manual_seed(0)
    sounds = list(front_end.decode(mels.nan_to_num(), generator=generator).clamp(-1, 1).numpy())
    for index, sound in enumerate(sounds):
        write_sound(folder / f"step-{step:07d}-{index}.wav", sound, front_end.config.sample_rate)
    for tracker in trackers:
        track(tracker, picture, sounds[:SHOWN], front_end.config.sample_rate, step)


def show_sounds(sounds: torch.Tensor, rate: int, titles: list[str], folder: Path, step: int, trackers: list) -> None:
    """The same for samples that are sounds already, of shape (count, samples)."""
    folder.mkdir(parents=True, exist_ok=True)
    sounds, picture = sounds.nan_to_num().clamp(-1, 1), folder / f"step-{step:07d}.png"
    draw_sounds(sounds[:SHOWN], rate, picture, titles)
    for index, sound in enumerate(sounds.numpy()):
        write_sound(folder / f"step-{step:07d}-{index}.wav", sound, rate)
    for tracker in trackers:
        track(tracker, picture, list(sounds[:SHOWN].numpy()), rate, step)


def track(tracker, picture: Path, sounds: list[np.ndarray], rate: int, step: int) -> None:
    """The trackers that show sounds, each in its own words; the others have the numbers and the files."""
    if tracker.name == "tensorboard":
        tracker.writer.add_image("samples", np.asarray(Image.open(picture).convert("RGB")), step, dataformats="HWC")
        for index, sound in enumerate(sounds):
            tracker.writer.add_audio(f"samples/{index}", sound[None], step, sample_rate=rate)
    elif tracker.name == "wandb":
        import wandb  # pyright: ignore[reportMissingImports]

        tracker.log({"samples": wandb.Image(str(picture))}, step=step)
        tracker.log({f"samples/{i}": wandb.Audio(sound, rate) for i, sound in enumerate(sounds)}, step=step)
