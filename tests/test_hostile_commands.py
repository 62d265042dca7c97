"""Folders made to do harm, given to every command that takes one: each is refused in one line, and runs nothing."""

import shutil
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  # makes a folder of its own when it is imported
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from small_pipes import save_small_pipes
from test_hostile_models import Evil, peak, rewrite, watching
from token_runs import motifs, tokenize, write_sounds
from training_runs import make_dataset, make_sounds, reset_accelerate

import tonefield
from tonefield import app, audio_to_tokens, evaluate, inference, train_sedd, train_unet
from tonefield.command_line import UserError
from tonefield.models import FSQCodec


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder of each kind that is sound, and data to use it with."""
    folder = tmp_path_factory.mktemp("made")
    pipes = save_small_pipes(folder)
    mel = tonefield.load(str(pipes["mel"])).mel
    size = dict(sample_rate=8000, n_fft=256, hop_length=128)
    flags = [f"--{name}={value}" for name, value in size.items()]
    make_dataset(make_sounds(folder / "sounds", 4), folder / "mels", *flags)
    torch.manual_seed(0)
    vae = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, latent_channels=1)
    vae.save_pretrained(folder / "autoencoder" / "vae")
    mel.save_pretrained(folder / "autoencoder" / "mel")
    shutil.copytree(pipes["text"] / "text_encoder", folder / "t5")
    shutil.copytree(pipes["text"] / "tokenizer", folder / "t5", dirs_exist_ok=True)
    codec = FSQCodec.from_preset("digits-8k", width=16, encoder_layers=1, decoder_layers=1)
    codec.save_pretrained(folder / "codec")
    codes = {"a": motifs(0, 4, np.random.default_rng(0), repeats=200)}
    tokenize(write_sounds(folder / "clips", codes), folder / "codec", folder / "rows")
    return folder


# What is given: a folder of `made`, the part of it that is changed, and a size in its settings that becomes absurd.
GIVEN = {
    "mels": ("mel", "unet", {"block_out_channels": [10**6, 10**6]}),
    "codes": ("tokens", "transformer", {"hidden_size": 2**20}),
    "autoencoder": ("autoencoder", "vae", {"block_out_channels": [10**6]}),
    "t5": ("t5", ".", {"d_ff": 2**33}),
    "codec": ("codec", ".", {"width": 2**22}),
    "rows": ("rows", "codec", {"width": 2**22}),
}

COMMANDS = {
    "train_unet --from_pretrained": (train_unet, "mels", "--dataset_name=MADE/mels", "--from_pretrained=IT"),
    "train_unet --vae": (train_unet, "autoencoder", "--dataset_name=MADE/mels", "--vae=IT"),
    "train_unet --text_encoder": (train_unet, "t5", "--dataset_name=MADE/mels", "--text_encoder=IT"),
    "train_sedd --text_encoder": (train_sedd, "t5", "--dataset_name=MADE/rows", "--text_encoder=IT"),
    "train_sedd --dataset_name": (train_sedd, "rows", "--dataset_name=IT"),
    "audio_to_tokens --codec": (audio_to_tokens, "codec", "--input_dir=MADE/clips", "--codec=IT"),
    "inference --model": (inference, "codes", "--model=IT"),
    "evaluate likelihood --model": (evaluate, "codes", "likelihood", "--dataset_name=MADE/rows", "--model=IT"),
    "evaluate sampling --model": (evaluate, "mels", "sampling", "--model=IT", "--output_dir=OUT"),
    "app --model": (None, "mels", "--model=IT"),
}


def pickled(part: Path, weights: Path, made: Path) -> None:
    torch.save(Evil(made), weights.with_suffix(".bin"))
    torch.save(Evil(made), part / "pytorch_model.bin")
    weights.unlink()


def cut(part: Path, weights: Path, made: Path) -> None:
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])


def incomplete(part: Path, weights: Path, made: Path) -> None:
    tensors = load_file(weights)
    del tensors[min(tensors)]
    save_file(tensors, weights, {"format": "pt"})


def with_code(part: Path, weights: Path, made: Path) -> None:
    """Code in the place of what the class is called, wherever libraries look for some."""
    for folder in part, part.parent:
        for name in "evil.py", "pipeline.py", "__init__.py":
            (folder / name).write_text(f"import os\nos.mkdir({str(made)!r})\nclass Evil: pass\n")
    auto_map = {f"Auto{what}": "evil.Evil" for what in ("Config", "Model", "Tokenizer")}
    code = {"auto_map": auto_map, "model_type": "evil", "architectures": ["Evil"], "custom_pipeline": "evil"}
    for file in part.glob("*config.json"):
        rewrite(file, **code, _class_name="Evil", tokenizer_class="Evil")
    if (part.parent / "model_index.json").exists():
        rewrite(part.parent / "model_index.json", _class_name=["evil", "Evil"], **{part.name: ["evil", "Evil"]})
    weights.unlink()


def absurd(part: Path, weights: Path, made: Path) -> None:
    """Sizes of which no memory holds the network; see `GIVEN`."""


REASONS = {  # what the line has to tell, whatever library tells it
    pickled: r"no file named \w+\.safetensors", cut: "Unable to load weights|incomplete metadata",
    incomplete: "tensors .*are missing, the first is ", absurd: "can't allocate memory|mismatch",
}  # fmt: skip


@pytest.mark.parametrize("harm", [pickled, cut, incomplete, with_code, absurd])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_it_in_one_line(made, tmp_path, capfd, command, harm):
    script, given, *flags = COMMANDS[command]
    source, part, size = GIVEN[given]
    folder = shutil.copytree(made / source, tmp_path / "it")
    (weights,) = (folder / part).glob("*.safetensors")
    harm(folder / part, weights, tmp_path / "made")
    if harm is absurd:
        rewrite(folder / part / "config.json", **size)
    places = {"MADE": made, "IT": folder, "OUT": tmp_path / "out"}
    argv = [flag.replace(name := flag.split("=")[-1].split("/")[0], str(places.get(name, name))) for flag in flags]
    argv += [f"--output_dir={tmp_path / 'out'}"] if script not in (None, evaluate) else []
    reset_accelerate()
    before = peak()
    with watching() as found, pytest.raises(UserError, match=REASONS.get(harm, "")) as told:
        if script is None:
            app.open_model(str(folder))
        else:
            script.main(script.parse_args(argv))
    assert "\n" not in str(told.value) and len(str(told.value)) < 1000
    flag = "The codec of" if given == "rows" else command.split()[-1]
    assert str(told.value).startswith(f"{flag} {folder} cannot be "), told.value
    assert not (tmp_path / "made").exists() and "[y/N]" not in capfd.readouterr().out  # nobody is asked about code
    assert [what for what in found if not what[1].startswith(str(tmp_path / "out"))] == [], told.value
    if harm is absurd:
        assert peak() - before < 2**19  # kB; what is imported takes some
