"""Recordings of digits in the form of what the models in pretrained/ make, for the tables of docs/digits.md.

    python docs/digits_sets.py digits mels/digits sets

Writes into `sets`: `train`, all that no model and no judge is measured on; `held_out-*`, what the mel models have not
been trained on; `others-*`, 300 of those that they have; `unseen*`, what the codec has not been trained on. `*-mel`
went through the mel front end and Griffin-Lim, `*-codec` through the codec. And `prompts.txt`.
"""

import argparse
import random
import shutil
from pathlib import Path


PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"
TOKEN_SECONDS = 0.45  # of a sound that digits-tokens is asked for
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")


def main(args: argparse.Namespace) -> None:
    import numpy as np
    import soundfile
    import torch
    from datasets import load_from_disk

    from tonefield import MelSpectrogram
    from tonefield.data.audio_folder import AudioFolder
    from tonefield.models import load_audio_tokenizer
    from tonefield.training.recordings import hold_out

    mel = MelSpectrogram.from_pretrained(PRETRAINED / "digits-poisson-flow" / "mel")
    codec = load_audio_tokenizer(PRETRAINED / "digits-tokens" / "audio_tokenizer").eval()
    rate, length, short = mel.config.sample_rate, mel.slice_samples, round(TOKEN_SECONDS * mel.config.sample_rate)
    recordings = list(AudioFolder(args.recordings))
    names = sorted(recording.name for recording in recordings)
    held_out = sorted(set(load_from_disk(args.mels)["validation"]["audio_file"]))
    unseen = sorted(recording.name for recording in hold_out(recordings, 0.05)[1])
    known = [name for name in names if name not in {*held_out, *unseen}]
    draw, digits = random.Random(0), sorted({name.split("/")[0] for name in known})
    others = [name for digit in digits for name in draw.sample([n for n in known if n.startswith(f"{digit}/")], 30)]

    def write(folder: str, name: str, sound: np.ndarray) -> None:
        file = args.sets / folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, sound, rate)

    def fit(sound: np.ndarray, samples: int) -> np.ndarray:
        return np.pad(sound[:samples], (0, max(0, samples - len(sound))))

    @torch.no_grad()
    def through_mel(sound: np.ndarray) -> np.ndarray:
        mels = mel.encode(torch.from_numpy(fit(sound, length))[None])
        return mel.decode(mels, generator=torch.Generator().manual_seed(0))[0].clamp(-1, 1).numpy()

    @torch.no_grad()
    def through_codec(sound: np.ndarray) -> np.ndarray:
        return codec.decode(codec.encode(torch.from_numpy(sound)[None], rate))[0].clamp(-1, 1).numpy()[: len(sound)]

    for name in known:
        target = args.sets / "train" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(args.recordings, name), target)
    for folder, some in (("held_out", held_out), ("others", others)):
        for name in some:
            sound = soundfile.read(Path(args.recordings, name), dtype="float32")[0]
            write(f"{folder}-mel", name, through_mel(sound))
            write(f"{folder}-codec", name, fit(through_codec(sound), short))
    for name in unseen:
        sound = soundfile.read(Path(args.recordings, name), dtype="float32")[0][:length]
        write("unseen", name, sound)
        write("unseen-mel", name, through_mel(sound)[: len(sound)])
        write("unseen-codec", name, through_codec(sound))
    prompts = [f"{speaker} says {digit}\n" for digit in digits for speaker in SPEAKERS]
    (args.sets / "prompts.txt").write_text("".join(prompts))
    print(f"{len(held_out)} held out, {len(others)} others, {len(unseen)} that the codec has not seen, in {args.sets}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", help="a folder for each digit")
    parser.add_argument("mels", help="the dataset of their mels")
    parser.add_argument("sets", type=Path, help="where the sets are written")
    main(parser.parse_args())
