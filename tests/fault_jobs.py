"""The scripts as jobs that are started again until they end, what they leave, and what of it must outlive a kill."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from small_pipes import save_small_pipes
from token_runs import TINY, flags_of, make_codec, motifs, tokenize, write_sounds
from training_runs import RECIPE, ROOT, TINY_CODEC, contents, make_dataset, make_sounds

from tonefield.training.checkpoints import DamagedCheckpoint, list_checkpoints, read_state


@dataclass
class Job:
    """
    Args:
        script: Its name.
        flags: Of every start alike, given the folder for what is written.
        result: What an undisturbed run leaves, in a form that can be compared.
        finished: What is there so far and need not be made again, as a set; some of it may be gone in the end.
        kept: What is there of it in the end, given the output of the last start.
    """

    script: str
    flags: Callable[[Path], list]
    result: Callable[[Path], Any]
    finished: Callable[[Path], set]
    kept: Callable[[Path, str], set]


def every_file(folder: Path) -> dict[str, bytes]:
    """All files below a folder, locks aside: nothing half-written may be left."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def files_by_place(paths) -> set:
    """Files that were neither written again nor replaced are the same ones on the disk."""
    return {(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


# ----- datasets


def dataset_job(script: str, sounds: Path, *flags: str) -> Job:
    def command(folder: Path) -> list:
        return [f"--input_dir={sounds}", f"--output_dir={folder / 'out'}", "--num_proc=2", "--resume", *flags]

    def inodes(paths) -> set:
        return {(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}

    def finished(folder: Path) -> set:
        if (folder / "out").exists():
            return inodes((folder / "out").rglob("*.arrow"))
        return inodes(note.with_suffix(".arrow") for note in (folder / "out.partial").glob("*-*.json"))

    return Job(
        script, command, every_file, finished, lambda folder, _: inodes((folder / "out").rglob("*.arrow"))
    )  # fmt: skip


def long_sounds(folder: Path) -> Path:
    """Recordings of a bit more than a megabyte, so that each is a part of its own."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        soundfile.write(folder / f"{index}.wav", 0.1 * rng.standard_normal(66 * 4000), 4000, subtype="FLOAT")
    return folder


def images_job(sounds: Path, *flags: str) -> Job:
    small = ["--sample_rate=4000", "--resolution=16,16", "--n_fft=512", "--hop_length=256"]
    return dataset_job("audio_to_images", sounds, *small, "--validation_fraction=0.25", *flags)


def tokens_job(sounds: Path, codec: Path, *flags: str) -> Job:
    return dataset_job("audio_to_tokens", sounds, f"--codec={codec}", "--validation_fraction=0.25", *flags)


# ----- training


def training_job(script: str, flags: list[str], latents: bool = False) -> Job:
    """Two checkpoints, of which one is kept, and two validations, of which the better one is kept."""
    often = ["--checkpointing_steps=1", "--checkpoints_total_limit=1", "--validation_steps=1", "--max_train_steps=2",
             "--num_validation_samples=0", "--logging_steps=1", "--best_metric=loss"]  # fmt: skip

    def command(folder: Path) -> list:
        cache = [f"--cache_latents={folder / 'latents'}"] if latents else []
        return [*flags, f"--output_dir={folder / 'out'}", *often, "--resume_from_checkpoint=latest", *cache]

    def result(folder: Path) -> Any:
        out = folder / "out"
        # How long a step took is told in the metrics and the card; random states and checksums depend on nothing else.
        loose = (
            "metrics.jsonl",
            "README.md",
            "model_index.json",
            "training.json",
            "state.json",
            "optimizer.bin",
            "scheduler.bin",
        )
        files = {name: data for name, data in every_file(out).items() if not name.endswith((*loose, ".pkl"))}
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        metrics = [(row["step"], row.get("loss"), row.get("validation_loss")) for row in rows]
        (checkpoint,) = list_checkpoints(out)
        state = {
            name: value.numpy().tobytes() if hasattr(value, "numpy") else value
            for name, value in contents(checkpoint).items()
        }
        beside = {name: data for name, data in every_file(folder).items() if not name.startswith("out/")}
        names = sorted(every_file(out))
        return {"names": names, "files": files, "metrics": metrics, "state": state, "beside": beside}

    def finished(folder: Path) -> set:
        """The newest checkpoint that is whole."""
        for path in reversed(list_checkpoints(folder / "out")):
            try:
                return {f"continuing from {path}, step {read_state(path)['step']}"}
            except DamagedCheckpoint:
                continue
        return set()

    return Job(script, command, result, finished, lambda _, output: set(output.splitlines()))


def unet_job(mels: Path) -> Job:
    return training_job("train_unet", [f"--config={RECIPE}", f"--dataset_name={mels}"])


def vae_job(folder: Path, latents: bool = False) -> Job:
    mels = make_dataset(
        make_sounds(folder / "sounds", 4), folder / "mels", "--resolution=32,16", "--hop_length=128"
    )  # fmt: skip
    recipe = ROOT / "recipes" / "test-tiny-vae.yaml"
    flags = [f"--config={recipe}", f"--dataset_name={mels}", "--discriminator_start=1"]
    return training_job("train_vae", flags, latents)


def codec_job(folder: Path) -> Job:
    folder.mkdir()
    (folder / "codec.yaml").write_text(TINY_CODEC)
    flags = [f"--input_dir={make_sounds(folder / 'sounds', 3)}", f"--codec_config={folder / 'codec.yaml'}"]
    small = ["--crop_seconds=0.25", "--train_batch_size=2", "--lr_warmup_steps=1", "--validation_fraction=0.2"]
    return training_job("train_codec", [*flags, *small])


def sedd_job(folder: Path) -> Job:
    folder.mkdir()
    codes = {name: motifs(kind, 6, np.random.default_rng(kind)) for kind, name in enumerate(("a", "b"))}
    sounds, network = write_sounds(folder / "sounds", codes), folder / "network.yaml"
    network.write_text(TINY)
    tokens = tokenize(sounds, make_codec(folder / "codec"), folder / "tokens", "--validation_fraction=0.3")
    flags = [flag for flag in flags_of(folder, tokens) if not flag.startswith("--output_dir")]
    return training_job("train_sedd", [*flags, f"--model_config={network}"])


# ----- sounds and reports


def inference_job(folder: Path) -> Job:
    model = save_small_pipes(folder)["mel"]

    def command(out: Path) -> list:
        small = ["--num_samples=5", "--batch_size=2", "--steps=2", "--n_iter=2"]
        return [f"--model={model}", f"--output_dir={out}", *small]

    def listed(out: Path) -> set:
        names = []
        for file in out.glob("manifest*.jsonl"):
            for line in file.read_text(errors="replace").splitlines():
                try:
                    names.append(json.loads(line)["file_name"])
                except ValueError:
                    continue
        return files_by_place(out / name for name in names)

    return Job("inference", command, every_file, listed, lambda out, _: listed(out))


def evaluation_job(folder: Path) -> Job:
    rng = np.random.default_rng(0)
    for name, pitch in (("real", 300), ("made", 330)):
        (folder / name).mkdir(parents=True)
        for index in range(8):
            time = np.arange(4000) / 8000
            sound = 0.3 * np.sin(2 * np.pi * pitch * (1 + index / 20) * time) + 0.01 * rng.standard_normal(4000)
            soundfile.write(folder / name / f"{index}.wav", sound, 8000)

    def command(out: Path) -> list:
        small = ["--metrics", "fad", "--bootstrap=5", "--samples=1", "--num_workers=2"]
        sets = [f"--reference={folder / 'real'}", f"--generated={folder / 'made'}"]
        return [*sets, *small, f"--cache_dir={out / 'cache'}", f"--out={out / 'report.json'}"]

    def result(out: Path) -> Any:
        report = json.loads((out / "report.json").read_text())
        pages = (out / "report.html").read_text().count("<audio")
        return {"results": report["results"], "sounds": pages, "names": sorted(every_file(out))}

    def finished(out: Path) -> set:
        """What is in the cache, but for locks and what is not complete."""
        kept = [path for path in (out / "cache").rglob("*") if path.is_file()]
        return files_by_place(
            path for path in kept if not any(part.startswith(".") for part in path.relative_to(out).parts)
        )

    return Job("evaluate", command, result, finished, lambda out, _: finished(out))
