"""What is measured as a whole: every trainer with the network of its recipe, or with a tiny one, on made-up sounds."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import soundfile
from accelerate.state import AcceleratorState, GradientState, PartialState

import tonefield
from tonefield import FSQCodec, audio_to_images, audio_to_tokens, train_sedd, train_unet, train_vae
from tonefield.data.synthetic import KINDS, synthesize
from tonefield.training.text import make_text_encoder


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
TINY_TRANSFORMER = '{"hidden_size": 32, "num_layers": 2, "num_heads": 2, "cond_dim": 16}'


@dataclass(frozen=True)
class Workload:
    """A trainer with its flags, and the arguments with which its pipeline is called, if it makes one."""

    script: ModuleType
    flags: list[str]
    call: dict[str, Any] | None

    def train(self, folder: Path, *flags: str) -> Path:
        """Runs the trainer in this process, and says nothing."""
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        args = self.script.parse_args([*self.flags, f"--output_dir={folder}", *flags])
        with silence():
            self.script.main(args)
        return folder

    def load(self, folder: Path) -> Any:
        with silence():
            pipe = tonefield.load(folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@contextlib.contextmanager
def silence():
    hidden = io.StringIO()
    with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
        yield


def make_sounds(folder: Path, count: int = 96) -> Path:
    """Made-up sounds of a second in three classes, each with a caption."""
    lines = ["file_name,caption"]
    for index in range(count):
        kind = KINDS[index % 3]
        (folder / kind).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / kind / f"{index}.wav", synthesize(kind, 1.0, 8000, index), 8000)
        lines.append(f"{kind}/{index}.wav,{kind} number {index % 10}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def make_workloads(folder: Path, tiny: bool = False) -> dict[str, Workload]:
    """
    The trainers by name, with their data in `folder`. The recipe says all but how long; with `tiny` the networks are
    the smallest that there are.
    """
    datasets.disable_progress_bars()
    sounds, mels, latents, tokens = (folder / name for name in ("sounds", "mels", "latents", "tokens"))
    make_sounds(sounds)
    source = [f"--input_dir={sounds}", "--num_proc=1", "--validation_fraction=0.1"]
    with silence():
        audio_to_images.main(audio_to_images.parse_args([*source, f"--output_dir={mels}", "--preset=fsdd-64"]))
        FSQCodec.from_preset("digits-8k").save_pretrained(folder / "codec")
        codec = f"--codec={folder / 'codec'}"
        audio_to_tokens.main(audio_to_tokens.parse_args([*source, f"--output_dir={tokens}", codec]))
        make_text_encoder([f"{kind} number {index}" for kind in KINDS for index in range(10)], folder / "words")

    def flags(recipe: str, data: Path, *more: str) -> list[str]:
        steady = ["--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=2", "--validation_steps=0"]
        return [f"--config={RECIPES / recipe}", f"--dataset_name={data}", *steady, *more]

    small = ["--model_size=tiny", "--train_batch_size=4"] if tiny else []
    vae_flags = flags("fsdd-vae-cpu.yaml", mels, *small)
    text_flags = flags("fsdd-text-cpu.yaml", latents, f"--text_encoder={folder / 'words'}")
    token_flags = flags("fsdd-tokens-cpu.yaml", tokens)
    if tiny:  # where the recipe gives the layers of a network itself, it is given without
        text_flags = [f"--dataset_name={latents}", *text_flags[2:], *small]
        token_flags += [f"--model_config={TINY_TRANSFORMER}", "--train_batch_size=4"]
    Workload(train_vae, vae_flags, None).train(folder / "vae", "--max_train_steps=1", f"--cache_latents={latents}")
    guided = dict(guidance_scale=3.0)
    return {
        "train_unet, mels": Workload(
            train_unet, flags("fsdd-64-cpu.yaml", mels, *small), guided | dict(class_labels=0)
        ),
        "train_unet, latents and text": Workload(train_unet, text_flags, guided | dict(prompt="plucks number 1")),
        "train_vae, with its opponent": Workload(train_vae, [*vae_flags, "--discriminator_start=0"], None),
        "train_sedd": Workload(train_sedd, token_flags, guided | dict(class_labels=0, num_frames=64)),
    }
