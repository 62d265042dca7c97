"""
Several processes are one run: they train, validate and write as one process with the same global batch does.

What is left between them is the order in which float32 numbers are summed. A loss or a gradient differs by some units
of the last place, 1e-7 of it; over the few steps here that becomes less than 1e-5. Adam divides by the gradient: with
its usual epsilon the rounding of a gradient that should be 0 would be a full step, so the epsilon is large here.
Dropout belongs to the batch of a process, so there is none.
"""

import importlib.util
import json
import signal
import time

import datasets
import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image
from process_groups import DIVIDED, ZERO, ProcessGroup
from safetensors.torch import load_file
from test_train_unet_latent import CAPTIONS, make_text_encoder, make_vae, write_captions
from token_runs import TINY, flags_of, make_codec, motifs, tokenize, write_sounds
from training_runs import RECIPE, ROOT, make_dataset, make_sounds, reset_accelerate, start, train

from tonefield import train_codec, train_sedd, train_unet, train_vae
from tonefield.command_line import UserError


SMOOTH = ("--adam_epsilon=0.01", "--learning_rate=0.05", "--max_train_steps=4", "--checkpointing_steps=1")
WATCHED = ("--validation_steps=2", "--num_validation_samples=4", "--validation_metrics", "fad")
VAE_RECIPE = ROOT / "recipes" / "test-tiny-vae.yaml"
OF_THE_MACHINE = {"samples_per_second", "seconds_per_step", "memory_gib"}


ENGINES = {
    "": {},
    "divided": DIVIDED,
    "zero": ZERO,
    "offloaded": ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
}


@pytest.fixture(scope="module")
def groups():
    """Groups of processes by their number and what is divided among them, made when they are asked for."""
    found = {}

    def group(which):
        count, _, engine = str(which).partition(" ")
        if engine in ("zero", "offloaded"):
            pytest.importorskip("deepspeed")
            if which in found and found[which].said:  # DeepSpeed is for one run in a process
                found[which].close()
        if which not in found or not all(process.is_alive() for process in found[which].processes):
            found[which] = ProcessGroup(int(count), ENGINES[engine])
        return found[which]

    yield group
    for group in found.values():
        group.close()


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files_in(folder):
    """What was written, but for the random states that each process has."""
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    return {name for name in files if "random_states" not in name}


def trained_weights(checkpoint):
    return {
        f"{file.parent.name}.{name}": value
        for file in sorted(checkpoint.glob("*/*.safetensors")) for name, value in load_file(file).items()
    }  # fmt: skip


def assert_same_run(one, several, steps=4):
    ours, theirs = logged(one), logged(several)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - OF_THE_MACHINE:
            # A sound of a network that has moved by 1e-7 goes through a sampler and Griffin-Lim before it is compared.
            tolerance = 1e-3 if name == "validation_fad" else 1e-4
            assert other[name] == pytest.approx(row[name], rel=tolerance, abs=1e-5), (name, row["step"])
    assert files_in(one) == files_in(several)
    assert_same_weights(one, several, steps)


def assert_same_weights(one, several, steps=4):
    """Of networks, their averages and adapters; since the first step they have changed far more than they differ."""
    last = f"checkpoint-{steps}"
    first, ours, theirs = map(trained_weights, (one / "checkpoint-1", one / last, several / last))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - first[name]).abs().max().item() for name in ours) > 0.01
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")


def batches(total, accumulation=1):
    return [f"--train_batch_size={total}", f"--gradient_accumulation_steps={accumulation}"]


# ----- the same run, however many do it


U_NETS = {
    "pfgmpp": (2, []),
    "no average": (1, ["--no-use_ema", "--best_metric=fad"]),
    "stable_target": (1, ["--objective=stable_target"]),
    "stable_target of many": (1, ["--objective=stable_target", "--field_batch_size=24"]),
    "field of many": (1, ["--objective=field", "--field_batch_size=24", "--no-class_conditional"]),
    "epsilon": (2, ["--objective=epsilon"]),
    "ve": (1, ["--objective=ve", "--num_inference_steps=21"]),
    "workers": (1, ["--dataloader_num_workers=1"]),
}


WAYS = [2, 4, "2 divided", "2 zero"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", U_NETS)
def test_u_nets(groups, mels, tmp_path, case, way):
    """Ten rows are held out, so that some processes have more of them than others."""
    group = groups(way)
    accumulation, flags = U_NETS[case]
    flags = (*SMOOTH, *WATCHED, "--dropout=0", "--max_validation_samples=10", *flags)
    one = train(tmp_path / "one", mels, *flags, *batches(8 // accumulation, accumulation))
    few = batches(8 // accumulation // group.count, accumulation)
    several = group.train(tmp_path / "several", mels, *flags, *few, config=RECIPE, script=train_unet)
    assert_same_run(one, several)


@pytest.mark.slow
@pytest.mark.parametrize("way", [4, "4 divided"])
def test_more_processes_than_held_out_rows(groups, mels, tmp_path, way):
    flags = (*SMOOTH, *WATCHED, "--dropout=0", "--max_validation_samples=3")
    one = train(tmp_path / "one", mels, *flags, *batches(8))
    several = groups(way).train(tmp_path / "several", mels, *flags, *batches(2), config=RECIPE, script=train_unet)
    assert_same_run(one, several)


@pytest.mark.slow
@pytest.mark.parametrize("way, start_at", [(2, 0), (2, 2), (4, 0), (4, 2), ("2 divided", None), ("2 zero", None)])
def test_autoencoders_and_their_opponents(groups, mels, tmp_path, start_at, way):
    group = groups(way)
    judge = "--discriminator_weight=0" if start_at is None else f"--discriminator_start={start_at}"
    flags = (*SMOOTH, *WATCHED, judge, f"--cache_latents={tmp_path}/latents")
    one = train(tmp_path / "one", mels, *flags, *batches(4, 2), config=VAE_RECIPE, script=train_vae)
    (tmp_path / "latents").rename(tmp_path / "latents of one")
    few = batches(4 // group.count, 2)
    several = group.train(tmp_path / "several", mels, *flags, *few, config=VAE_RECIPE, script=train_vae)
    assert_same_run(one, several)
    ours, theirs = (datasets.load_from_disk(str(tmp_path / name))["train"] for name in ("latents of one", "latents"))
    np.testing.assert_allclose(ours["latents"], theirs["latents"], atol=2e-3)  # of float16


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A folder with mels that have captions, their latents in `vae-latents`, a T5 and a pipeline from text."""
    folder = tmp_path_factory.mktemp("captioned")
    sounds = make_sounds(folder / "sounds")
    write_captions(sounds, lambda file: CAPTIONS[(file.parent.name == "high") * (1 + int(file.stem) % 2)])
    mels = make_dataset(sounds, folder / "mels")
    words, vae = make_text_encoder(folder / "t5"), make_vae(mels, folder / "vae", "--latent_dims=8,8")
    flags = (f"--vae={vae}", f"--text_encoder={words}", "--objective=epsilon", "--max_train_steps=1", "--dropout=0")
    train(folder / "base", mels, *flags, "--num_validation_samples=0")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", [2, "2 divided", "2 zero"])
@pytest.mark.parametrize("case", ["latents", "on the fly", "lora", "charges on the fly"])
def test_latents_captions_and_adapters(groups, captioned, tmp_path, case, way):
    known_to_a_pipeline = dict.fromkeys(train_unet.KNOWN_TO_A_PIPELINE)
    recipe = {name: value for name, value in yaml.safe_load(RECIPE.read_text()).items()
              if name not in known_to_a_pipeline}  # fmt: skip
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(recipe))
    words, vae = f"--text_encoder={captioned}/t5", f"--vae={captioned}/vae"
    config, data, flags = {
        "latents": (RECIPE, "vae-latents", [words, "--dropout=0"]),
        "on the fly": (RECIPE, "mels", [vae, words, "--dropout=0"]),
        "lora": (
            tmp_path / "lora.yaml",
            "mels",
            [f"--from_pretrained={captioned}/base", "--lora_rank=2", "--adam_epsilon=0.001"],
        ),
        "charges on the fly": (RECIPE, "mels", [vae, "--objective=stable_target", "--dropout=0"]),
    }[case]
    flags = (*SMOOTH, *WATCHED, *flags)

    def together():
        few = (*flags, *batches(2, 2))
        return groups(way).train(tmp_path / "several", captioned / data, *few, config=config, script=train_unet)

    if case == "lora" and way != 2:
        with pytest.raises(AssertionError, match=r"--lora_rank does not go with (FSDP|ZeRO)"):
            together()
        return
    one = train(tmp_path / "one", captioned / data, *flags, *batches(4, 2), config=config)
    assert_same_run(one, together())


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A folder with codes of sounds in two classes, of unequal length, and a network's configuration."""
    folder, rng = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
    codes = {name: [row[: 8 + index] for index, row in enumerate(motifs(kind, 10, rng))]
             for kind, name in enumerate(("low", "high"))}  # fmt: skip
    sounds = write_sounds(folder / "sounds", codes)
    write_captions(sounds, lambda file: "" if file.stem == "0003" else CAPTIONS[file.parent.name == "high"])
    tokenize(sounds, make_codec(folder / "codec"), folder / "data", "--validation_fraction=0.35")
    (folder / "network.yaml").write_text(TINY)
    make_text_encoder(folder / "t5")
    return folder


TOKENS = {
    "absorb": ["--t_sampling=mask_count"],
    "uniform": ["--graph_type=uniform", "--noise_schedule=geometric"],
    "text": ["--text_encoder=T5", "--no-class_conditional"],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", TOKENS)
def test_tokens(groups, tokens, tmp_path, case, way):
    group = groups(way)
    flags = [flag.replace("T5", f"{tokens}/t5") for flag in TOKENS[case]]
    flags = [f"--model_config={tokens}/network.yaml", *SMOOTH, *WATCHED, *flags, "--dropout=0"]
    reset_accelerate()
    train_sedd.main(train_sedd.parse_args(flags_of(tmp_path / "one", tokens / "data", *flags, *batches(4, 2))))
    argv = flags_of(tmp_path / "several", tokens / "data", *flags, *batches(4 // group.count, 2))
    group.run(train_sedd, argv)
    assert_same_run(tmp_path / "one", tmp_path / "several")


@pytest.mark.slow
@pytest.mark.parametrize("way", [2, "2 divided", "2 zero"])
def test_codecs(groups, sounds, tmp_path, way):
    (tmp_path / "codec.yaml").write_text(
        "sampling_rate: 4000\nhop_length: 40\nn_fft: 160\nlevels: [5, 5]\nwidth: 16\nencoder_layers: 1\n"
        "decoder_layers: 1\n"
    )
    flags = [f"--input_dir={sounds}", f"--codec_config={tmp_path}/codec.yaml", "--crop_seconds=0.25",
             "--validation_fraction=0.3",
             "--lr_warmup_steps=2", "--logging_steps=1", *SMOOTH, *WATCHED]  # fmt: skip
    reset_accelerate()
    argv = [*flags, f"--output_dir={tmp_path}/one", *batches(4, 2)]
    train_codec.main(train_codec.parse_args(argv))
    groups(way).run(train_codec, [*flags, f"--output_dir={tmp_path}/several", *batches(2, 2)])
    assert_same_run(tmp_path / "one", tmp_path / "several")


# ----- resuming with another number of processes


@pytest.mark.slow
def test_others_can_continue_a_run(groups, mels, tmp_path):
    """Each step is done by others than the one before: the run of one."""
    ways = [2, 1, "2 divided", 4, "4 divided", 1]
    if importlib.util.find_spec("deepspeed"):
        ways += ["2 zero", "1 offloaded", "2 divided", "4 zero", 2, "2 offloaded"]
    flags = (*SMOOTH, "--dropout=0", "--lr_scheduler=constant_with_warmup", f"--max_train_steps={len(ways)}")
    one = train(tmp_path / "one", mels, *flags, *batches(8))
    folder, resume = tmp_path / "several", "--resume_from_checkpoint=latest"
    for step, way in enumerate(ways, 1):
        these = (*flags, f"--max_train_steps={step}", resume)
        if way == 1:
            train(folder, mels, *these, *batches(4, 2))
        else:
            group = groups(way)
            group.train(folder, mels, *these, *batches(8 // group.count), config=RECIPE, script=train_unet)
            if way in ("2 zero", "4 zero", "1 offloaded", "2 offloaded"):
                group.close()  # DeepSpeed keeps what it was given, and with it the claim to the folder
    assert_same_weights(one, folder, len(ways))
    ours, theirs = ({row["step"]: row["loss"] for row in logged(path) if "loss" in row} for path in (one, folder))
    assert theirs == pytest.approx(ours, rel=1e-4)
    with pytest.raises(UserError, match="samples per step 8, this run has 4: they must be equal"):
        train(folder, mels, *flags, *batches(4), resume)


# ----- one process ends before the others


@pytest.mark.slow
def test_the_allotted_time_of_one_ends_all(groups, mels, tmp_path):
    """Not that of the first one; the pipeline is written all the same."""
    argv = [f"--config={RECIPE}", f"--dataset_name={mels}", f"--output_dir={tmp_path}"]
    groups(2).run(train_unet, argv, of_last=("--max_hours=1e-9",))
    assert "stopped at step 1 by --max_hours" in groups(2).said[0]
    assert (tmp_path / "checkpoint-1").is_dir() and (tmp_path / "model_index.json").is_file()


# On a machine without a GPU `accelerate launch` starts several processes if it takes them for those of GPUs; with
# `--cpu` it starts one, however many it is asked for.
LAUNCHER = f"-m accelerate.commands.launch --config_file={ROOT}/recipes/accelerate/8gpu.yaml --num_processes=2"
LAUNCHER = [*LAUNCHER.split(), "--main_process_port=0"]
DIVIDING = [word.replace("8gpu", "fsdp") for word in LAUNCHER]
ENDLESS = ("--checkpointing_steps=2", "--checkpoints_total_limit=1", "--max_train_steps=100000")


def process_of(launched, rank):
    """The process of a rank below the one that was launched."""
    for child in psutil.Process(launched.pid).children(recursive=True):
        if any(word.endswith("train_unet.py") for word in child.cmdline()) and child.environ().get("RANK") == rank:
            return child
    raise AssertionError(f"there is no process {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("launcher", [LAUNCHER, DIVIDING], ids=["each has all", "divided"])
def test_a_signal_to_one(mels, tmp_path, launcher, number, rank):
    """All of them save and leave, or all fail."""
    launched = start(tmp_path, mels, *ENDLESS, launcher=launcher)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint-2").exists():
        assert launched.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process_of(launched, rank).send_signal(number)
    output = launched.communicate(timeout=120)[0]
    assert launched.returncode != 0
    last = logged(tmp_path)[-1]["step"]
    if number == signal.SIGTERM:
        assert f"stopped at step {last} by SIGTERM" in output
        assert "cannot reach" not in output
        (checkpoint,) = tmp_path.glob("checkpoint-*")
        assert checkpoint.name == f"checkpoint-{last}"
    else:
        assert output.count("error: this process cannot reach the others") == 1
    assert not (tmp_path / "model_index.json").exists()


@pytest.mark.slow
def test_bad_data_of_one(tmp_path):
    """A picture of another size, which one of the processes comes across; all look at the first 1000 beforehand."""
    size = [(8, 8)] * 1000 + [(8, 16)]
    rows = {"image": [Image.fromarray(np.full(shape, index % 256, np.uint8)) for index, shape in enumerate(size)]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(tmp_path / "data")
    flags = ("--image_column=image", "--max_train_steps=100", "--train_batch_size=16", "--logging_steps=100")
    launched = start(tmp_path / "out", tmp_path / "data", *flags, launcher=LAUNCHER)
    output = launched.communicate(timeout=300)[0]
    assert launched.returncode != 0
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert sorted(line[:25] for line in lines) == ["error: A picture has 16 x", "error: this process canno"], output


@pytest.mark.slow
def test_launched_as_people_do(mels, tmp_path):
    """Some of the scripts that train, once."""
    flags = ("--max_train_steps=2", "--validation_steps=2", "--num_validation_samples=2")
    for script, config, launcher in (
        (train_unet, RECIPE, LAUNCHER), (train_unet, RECIPE, DIVIDING), (train_vae, VAE_RECIPE, LAUNCHER)
    ):  # fmt: skip
        folder = tmp_path / f"{script.__name__}-{launcher is DIVIDING}"
        launched = start(folder, mels, *flags, launcher=launcher, config=config, script=script)
        output = launched.communicate(timeout=300)[0]
        assert launched.returncode == 0, output
        assert [row["step"] for row in logged(folder)] == [1, 2, 2]
        assert (folder / "README.md").is_file()
