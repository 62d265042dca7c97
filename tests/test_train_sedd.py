"""The script as a whole: what it reads from a dataset of tokens, what every flag does, and what it refuses."""

import json
import math
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from fake_hub import check_players
from safetensors.torch import load_file
from token_runs import CODES, TINY, flags_of, make_codec, motifs, start, tokenize, train, write_sounds
from training_runs import ROOT, differences, reset_accelerate

import tonefield
from tonefield import MuLawTokenizer, SEDDTransformer1DModel, train_sedd
from tonefield.command_line import UserError
from tonefield.data.loading import RECORD_COLUMN, read_record, record_feature
from tonefield.training.loop import make_accelerator
from tonefield.training.randomness import make_generators
from tonefield.training.text import open_text_encoder
from tonefield.training.token_data import open_tokens


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("network") / "tiny.yaml"
    file.write_text(TINY)
    return file


def random_codes(low: int, high: int, frames: list[int], hop: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(low, high, count * hop) for count in frames]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """Two classes of 15 recordings of 4 to 18 frames, all different; three of each are held out."""
    folder = tmp_path_factory.mktemp("tokens")
    codes = {name: random_codes(*codes, list(range(4, 19)), 1, seed) for name, codes, seed in
             (("high", (8, 16), 0), ("low", (0, 8), 1))}  # fmt: skip
    sounds = write_sounds(folder / "sounds", codes)
    return tokenize(sounds, make_codec(folder / "codec"), folder / "data", "--validation_fraction=0.2")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Recordings of two codebooks, of 3 to 8 frames."""
    folder = tmp_path_factory.mktemp("pairs")
    sounds = write_sounds(folder / "sounds", {"all": random_codes(0, 16, [3, 8, 5, 4, 6, 7] * 2, 2, 0)}, 2)
    return tokenize(sounds, make_codec(folder / "codec", 2), folder / "data", "--validation_fraction=0.2")


def rows_of(folder: Path, split: str = "train") -> list[np.ndarray]:
    return [np.array(row) for row in datasets.load_from_disk(str(folder))[split]["codes"]]


def parsed(dataset, network, *flags):
    unused = Path(dataset).parent / "unused"
    unused.mkdir(exist_ok=True)
    return train_sedd.parse_args(flags_of(unused, dataset, f"--model_config={network}", *flags))


def built(dataset, network, *flags, random=True):
    """The data, the scheduler, the loss and a network: one that answers, for a fresh one says the same to all."""
    args = parsed(dataset, network, *flags)
    data = open_tokens(args, args.layout)
    scheduler = train_sedd.make_scheduler(args, data.codec)
    model = train_sedd.make_transformer(args, data, scheduler)
    if random:
        torch.manual_seed(1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    condition = train_sedd.make_condition(args, data, None)
    return args, data, scheduler, model, train_sedd.make_loss(args, scheduler, data, condition, 8)


def batch_of(data, positions):
    """A batch as the loop hands it on, and its generators."""
    batch = data.train.get(positions)
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    return tensors, make_generators(0, "noise", positions)


# ----- what is read


def test_crops_lie_within_a_recording_and_come_from_all_over_it(tokens, network):
    _, data, *_ = built(tokens, network, "--seq_length=8")
    rows = rows_of(tokens)
    seen: dict[int, set[int]] = {}
    for position in range(40 * len(rows)):
        row, number = rows[data.train.row_of(position)][0], data.train.row_of(position)
        crop = data.train.get([position])["tokens"][0, 0].numpy()
        assert len(crop) == min(8, len(row))
        starts = [start for start in range(len(row) - len(crop) + 1) if (row[start : start + len(crop)] == crop).all()]
        assert starts
        seen.setdefault(number, set()).update(starts)
    assert all(seen[number] == set(range(max(1, len(row) - 7))) for number, row in enumerate(map(np.ravel, rows)))
    again = [data.train.get([5])["tokens"] for _ in range(2)]
    assert torch.equal(*again)


def test_short_recordings_are_padded_and_masked(tokens, network):
    _, data, *_ = built(tokens, network)
    batch, _ = batch_of(data, [0, 1, 2, 3])
    rows = [rows_of(tokens)[data.train.row_of(position)][0] for position in range(4)]
    assert data.num_frames == max(len(row[0]) for row in rows_of(tokens))
    for row, seen, mask in zip(rows, batch["tokens"][:, 0], batch["mask"], strict=True):
        assert mask.tolist() == [True] * len(row) + [False] * (len(seen) - len(row))
        assert seen[mask].tolist() == row.tolist()
    assert batch["tokens"].shape[-1] == max(map(len, rows))
    assert data.class_names == ["high", "low"]
    means = [min(row.shape[1], data.num_frames) for row in rows_of(tokens)]
    assert data.mean_frames == np.mean(means)


CASES = {
    "stratified": ("tokens",), "uniform t": ("tokens", "--t_sampling=uniform"),
    "importance": ("tokens", "--t_sampling=importance"),
    "mask_count": ("tokens", "--t_sampling=mask_count"), "score": ("tokens", "--parameterization=score"),
    "uniform graph": ("tokens", "--graph_type=uniform", "--noise_schedule=geometric"),
    "parallel": ("pairs",), "flatten": ("pairs", "--layout=flatten"),
    "codebook_major": ("pairs", "--layout=codebook_major"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_padded_batch_is_the_sum_of_its_rows(request, network, case):
    """Loss and gradients: so padding is neither masked nor attended to nor counted, and it does not matter how a step
    is divided into batches and processes."""
    name, *flags = CASES[case]
    _, data, _, model, compute_loss = built(request.getfixturevalue(name), network, *flags, "--dropout=0")
    positions = list(range(10, 16))

    def gradients(rows, change=lambda batch: None):
        model.zero_grad()
        batch, generators = batch_of(data, rows)
        change(batch)
        loss = compute_loss(model, batch, generators) * len(rows)
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), loss.item()

    together, loss = gradients(positions)
    apart = [gradients([position]) for position in positions]
    largest = together.abs().max().item()
    assert largest > 1e-3
    torch.testing.assert_close(sum(each for each, _ in apart), together, rtol=0, atol=1e-5 * largest)
    assert sum(each for _, each in apart) == pytest.approx(loss, rel=1e-5)

    def scramble(batch):
        keep = batch["mask"] if batch["tokens"].ndim == 2 else batch["mask"][:, None]
        assert not keep.all()
        batch["tokens"] = torch.where(keep, batch["tokens"], (batch["tokens"] + 7) % CODES)

    torch.testing.assert_close(gradients(positions, scramble)[0], together, rtol=0, atol=0)


def test_times_of_a_step_are_spread_evenly_however_it_is_divided(tokens, network):
    scheduler = built(tokens, network)[2]
    clean, step = torch.zeros(4, 6, dtype=torch.long), []
    for positions in [8, 9, 10, 11], [12, 13, 14, 15]:
        places = torch.tensor(positions) % 8
        step.append(scheduler.sample_noisy(clean, make_generators(0, "noise", positions), strata=(places, 8))[1])
    assert ((torch.cat(step) - 1e-3) / (1 - 1e-3) * 8).floor().tolist() == list(range(8))


# ----- what is measured


def unigram(model, weights: torch.Tensor):
    """A network that says the same of every token: a fresh one with another bias."""
    with torch.no_grad():
        model.head.bias[: len(weights)] = weights.log()
    return model


def test_a_fresh_network_loses_ln_n_per_token(tokens, network):
    _, data, _, model, compute_loss = built(tokens, network, "--t_sampling=mask_count", random=False)
    lengths = [rows_of(tokens)[data.train.row_of(position)].shape[1] for position in range(4)]
    loss = compute_loss(model, *batch_of(data, [0, 1, 2, 3])).item()
    assert loss == pytest.approx(math.log(CODES) * np.mean(lengths) / data.mean_frames, rel=1e-6)


@pytest.mark.parametrize("flags", [[], ["--seq_length=5"], ["--seq_length=1"]])
def test_validation_is_the_bound_of_all_that_is_held_out(tokens, network, flags):
    """Of a network for which the bound is exact: of every split into masks for sequences of one token, and on average
    over the masks for longer ones."""
    flags = ["--validation_steps=1", "--train_batch_size=16", "--num_validation_draws=16", *flags]
    args, data, scheduler, model, _ = built(tokens, network, *flags, random=False)
    reset_accelerate()
    condition = train_sedd.make_condition(args, data, None)
    validate = train_sedd.make_validation(args, make_accelerator(args), scheduler, data, condition)
    assert validate(model)["validation_loss"] == pytest.approx(math.log(CODES), rel=1e-6)
    weights = torch.rand(CODES, generator=torch.Generator().manual_seed(0)) + 0.3
    found = validate(unigram(model, weights))
    held_out = np.concatenate(rows_of(tokens, "validation"), axis=1)[0]
    exact = -(weights / weights.sum()).log()[held_out].mean().item()
    assert abs(exact - math.log(CODES)) > 0.03
    exactness = 1e-6 if data.num_frames == 1 else 5e-3
    assert found["validation_loss"] == pytest.approx(exact, rel=exactness)
    assert found["validation_bits_per_token"] == pytest.approx(found["validation_loss"] / math.log(2), rel=1e-9)
    assert validate(model) == found
    windows = [[batch["tokens"][..., 0, :] for batch in data.validation_batches(1, process, 2)] for process in (0, 1)]
    ordered = [windows[number % 2][number // 2] for number in range(len(data.windows))]
    assert torch.cat(ordered, dim=1)[0].tolist() == held_out.tolist()


@pytest.mark.parametrize("flags", [[], ["--graph_type=uniform", "--noise_schedule=geometric"]])
def test_validation_does_not_depend_on_batches_and_processes(tokens, network, flags):
    """A recording alone in a batch is not padded, and meets the same noise nevertheless."""
    args, data, scheduler, model, _ = built(tokens, network, "--validation_steps=1", *flags)
    reset_accelerate()
    condition, found = train_sedd.make_condition(args, data, None), []
    for args.train_batch_size in (1, 16):
        validate = train_sedd.make_validation(args, make_accelerator(args), scheduler, data, condition)
        found.append(validate(model)["validation_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# ----- what every flag does


@pytest.fixture(scope="module")
def usual(tokens, network, tmp_path_factory):
    return train(tmp_path_factory.mktemp("usual"), tokens, network, "--max_train_steps=2")


def weights(folder: Path) -> torch.Tensor:
    saved = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return torch.cat([saved[name].flatten() for name in sorted(saved)])


@pytest.mark.parametrize("flag", [
    "--seq_length=6", "--label_dropout=0.9", "--dropout=0.5", "--noise_schedule=cosine", "--eps=0.5",
    "--noise_schedule=geometric", "--noise_schedule=linear", "--parameterization=score", "--time_conditioning",
    "--t_sampling=uniform", "--t_sampling=importance", "--t_sampling=mask_count", "--sampling_eps=0.5",
    "--no-class_conditional",
])  # fmt: skip
def test_every_flag_changes_the_loss(tokens, network, flag):
    def loss(*flags):
        _, data, _, model, compute_loss = built(tokens, network, *flags)
        torch.manual_seed(0)
        return compute_loss(model, *batch_of(data, list(range(8)))).item()

    assert loss() == loss()
    assert abs(loss() - loss(flag)) > 1e-6


@pytest.mark.parametrize("schedule", ["geometric", "linear"])
@pytest.mark.parametrize("flag", ["--sigma_min=0.1", "--sigma_max=3"])
def test_flags_of_the_noise(tokens, network, schedule, flag):
    usual, other = (
        built(tokens, network, f"--noise_schedule={schedule}", *flags)[2].sigma(torch.tensor([0.5]))
        for flags in ([], [flag])
    )
    assert usual != other


def test_flags_of_the_network(tokens, pairs, network, tmp_path):
    def made(dataset, *flags):
        args = train_sedd.parse_args([f"--dataset_name={dataset}", *flags])
        data = open_tokens(args, args.layout)
        return train_sedd.make_transformer(args, data, train_sedd.make_scheduler(args, data.codec))

    micro = made(tokens, "--model_size=micro", "--dropout=0.3", "--max_train_samples=3")
    # V d + (256 c + 2 c + c^2) + blocks (12 d^2 + 7 d + 6 c d + 6 d) + d + V d + V + 2 c d + 2 d, classes c each
    d, c, v = 256, 128, 17
    count = v * d + 258 * c + c * c + 6 * (12 * d * d + 13 * d + 6 * c * d) + d + v * d + v + 2 * c * d + 2 * d + 3 * c
    assert sum(parameter.numel() for parameter in micro.parameters()) == count
    assert (micro.config.dropout, micro.config.num_classes, micro.config.time_conditioning) == (0.3, 2, False)
    assert micro.config.max_length == max(rows_of(tokens)[row].shape[1] for row in range(3))
    plain = made(tokens, f"--model_config={network}", "--no-class_conditional", "--graph_type=uniform")
    assert (plain.config.num_classes, plain.config.time_conditioning, plain.config.hidden_size) == (None, True, 32)
    for layout, size in ("parallel", 16), ("flatten", 32), ("codebook_major", 32):
        config = made(pairs, f"--model_config={network}", f"--layout={layout}").config
        assert (config.layout, config.vocab_size, config.num_codebooks) == (layout, size, 2)


@pytest.mark.parametrize("flags", [
    ["--graph_type=uniform", "--noise_schedule=geometric", "--num_validation_draws=64"],
    ["--layout=flatten", "--streaming"], ["--gradient_checkpointing", "--mixed_precision=bf16", "--no-use_ema"],
])  # fmt: skip
def test_it_goes_through(pairs, network, tmp_path, flags):
    train(tmp_path, pairs, network, "--max_train_steps=2", "--validation_steps=2", *flags)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for row in logged for value in row.values())
    assert logged[-1]["validation_loss"] == pytest.approx(math.log(16), rel=0.2)
    sound, rate = soundfile.read(tmp_path / "samples" / "step-0000002-1.wav")
    frames = np.mean([row.shape[1] for row in rows_of(pairs)])
    assert rate == 8000 and len(sound) == 2 * round(frames)
    assert (tmp_path / "samples" / "step-0000002.png").stat().st_size > 1000


def test_test_switch_and_the_pipeline(tokens, network, tmp_path, capsys):
    reset_accelerate()
    flags = [f"--dataset_name={tokens}", f"--output_dir={tmp_path}", f"--model_config={network}", "--test"]
    train_sedd.main(train_sedd.parse_args(flags))
    assert all(f"step {step}: loss" in capsys.readouterr().out or step > 1 for step in (1, 2, 3, 4))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    pipe = tonefield.load(str(tmp_path))
    record = read_record(datasets.load_from_disk(str(tokens))["train"].features)
    assert pipe.audio_tokenizer.fingerprint() == record["codec"]["fingerprint"]
    assert pipe.config.label2id == {"high": 0, "low": 1}
    average = SEDDTransformer1DModel.from_pretrained(tmp_path / "checkpoint-4", subfolder="transformer_ema")
    for ours, theirs in zip(pipe.transformer.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    pipe.set_progress_bar_config(disable=True)
    sounds = pipe(class_labels=["low", "high"], num_frames=9, num_inference_steps=9)
    assert sounds.audios.shape == (2, 9) and sounds.sampling_rate == 8000
    assert json.loads((tmp_path / "training.json").read_text())["class_names"] == ["high", "low"]


# ----- whole runs


def test_what_is_pushed_is_whole(hub, tokens, network, tmp_path):
    flags = ("--push_to_hub", "--hub_model_id=someone/tokens", "--max_train_steps=1", "--validation_steps=1")
    folder = train(tmp_path / "out", tokens, network, *flags)
    card = check_players(hub, "models", "someone/tokens", at_least=2)
    assert "| high | <audio" in card and "| low | <audio" in card and "python train_sedd.py" in card
    there, here = tonefield.load("someone/tokens"), tonefield.load(folder)
    for name, value in here.transformer.state_dict().items():
        assert torch.equal(there.transformer.state_dict()[name], value)
    assert there.audio_tokenizer.fingerprint() == here.audio_tokenizer.fingerprint()


def test_a_resumed_run_is_exact(tokens, network, tmp_path):
    flags = ("--checkpointing_steps=3", "--validation_steps=2")
    whole = train(tmp_path / "whole", tokens, network, *flags)
    shutil.copytree(whole, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-6")  # what a run has left that was killed after step 3
    (tmp_path / "again" / "metrics.jsonl").unlink()
    train(tmp_path / "again", tokens, network, *flags, "--resume_from_checkpoint=latest")
    assert differences(whole / "checkpoint-6", tmp_path / "again" / "checkpoint-6") == []

    def losses(folder):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row.get("loss"), row.get("validation_loss")) for row in rows if row["step"] > 3]

    assert losses(whole) == losses(tmp_path / "again")
    for sound in sorted((whole / "samples").glob("step-0000006*")):
        assert sound.read_bytes() == (tmp_path / "again" / "samples" / sound.name).read_bytes()


@pytest.mark.slow
def test_a_killed_run_is_exact(tokens, network, tmp_path):
    whole = train(tmp_path / "whole", tokens, network, "--max_train_steps=60", "--checkpointing_steps=20")
    flags = ("--max_train_steps=60", "--checkpointing_steps=20", "--validation_steps=1")
    process = start(tmp_path / "killed", tokens, network, *flags)
    while not (tmp_path / "killed" / "checkpoint-20").exists():
        assert process.poll() is None, process.stdout.read()
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "checkpoint-60").exists()
    train(tmp_path / "killed", tokens, network, *flags, "--resume_from_checkpoint=latest")
    assert differences(whole / "checkpoint-60", tmp_path / "killed" / "checkpoint-60") == []


def test_accumulation_equals_a_large_batch(tokens, network, tmp_path):
    smooth = ("--adam_epsilon=0.01", "--dropout=0", "--learning_rate=0.05", "--max_train_steps=3")
    one = train(tmp_path / "one", tokens, network, *smooth, "--train_batch_size=8", "--gradient_accumulation_steps=1")
    four = train(
        tmp_path / "four", tokens, network, *smooth, "--train_batch_size=2", "--gradient_accumulation_steps=4"
    )
    torch.testing.assert_close(weights(one), weights(four), rtol=0, atol=2e-5)
    assert (weights(one) - weights(one / "checkpoint-3")).abs().max() > 0.01  # the average lags behind


def test_the_last_code_survives_the_whole_way(network, tmp_path):
    """From sound to tokens to a network to tokens to sound: the code N - 1 is one like any other."""
    rng = np.random.default_rng(0)
    codes = {"last": np.full((20, 8), CODES - 1), "other": rng.integers(0, CODES - 1, (20, 8))}
    sounds = write_sounds(tmp_path / "sounds", codes)
    data = tokenize(sounds, make_codec(tmp_path / "codec"), tmp_path / "data", "--validation_fraction=0.1")
    flags = (
        "--max_train_steps=60",
        "--learning_rate=0.01",
        "--train_batch_size=16",
        "--gradient_accumulation_steps=1",
    )
    pipe = tonefield.load(str(train(tmp_path / "out", data, network, *flags)))
    pipe.set_progress_bar_config(disable=True)
    length = dict(batch_size=50, num_frames=8, num_inference_steps=8, generator=torch.manual_seed(0))
    made = pipe(class_labels="last", **length)
    assert (np.asarray(made.tokens) == CODES - 1).mean() > 0.9
    level = MuLawTokenizer(mu=CODES - 1).levels[-1].item()
    assert (made.audios == level).mean() > 0.9
    other = np.asarray(pipe(class_labels="other", **length).tokens)
    assert (other == CODES - 1).mean() < 0.1 and len(np.unique(other)) == CODES - 1


# ----- text


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "low": 3, "high": 4, "very": 5}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    ).save_pretrained(folder)
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> Path:
    """Two sounds, each with its text, and two recordings without any."""
    folder = tmp_path_factory.mktemp("captioned")
    sounds = write_sounds(folder / "sounds", {"a": np.full((16, 6), 3), "b": np.full((16, 6), 12)})
    names = [f"{kind}/{index:04d}.wav" for kind in "ab" for index in range(16)]
    lines = [f"{name},{'' if '15' in name else 'very low' if name[0] == 'a' else 'high'}" for name in names]
    (sounds / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]) + "\n")
    return tokenize(sounds, make_codec(folder / "codec"), folder / "data", "--validation_fraction=0.2")


def test_texts_are_read_and_withheld(captioned, network, text_encoder, tmp_path):
    flags = (f"--text_encoder={text_encoder}", "--no-class_conditional")
    args = parsed(captioned, network, *flags)
    tokenizer, encoder = open_text_encoder(args)
    rows, positions = open_tokens(args, "parallel", train_sedd.Words(tokenizer)), list(range(26))
    batch, _ = batch_of(rows, positions)
    told = []
    for args.prompt_dropout in (0, 0.5):
        generators = make_generators(0, "noise", positions)
        condition = train_sedd.make_condition(args, rows, encoder)(batch, generators, True)
        told.append(condition["encoder_attention_mask"].any(dim=1))
    texts = [rows.train.rows[rows.train.row_of(position)]["caption"] for position in positions]
    assert told[0].tolist() == [bool(text) for text in texts] and not told[0].all()
    assert 4 < (told[0] & ~told[1]).sum() < 22 and not (told[1] & ~told[0]).any()
    states = condition["encoder_hidden_states"]
    alone = tokenizer("very low", return_tensors="pt")
    expected = encoder(alone.input_ids).last_hidden_state[0]
    torch.testing.assert_close(states[texts.index("very low"), : len(expected)], expected, rtol=0, atol=1e-6)

    folder = train(tmp_path / "out", captioned, network, *flags, "--max_train_steps=2", "--validation_steps=2")
    saved = load_file(folder / "text_encoder" / "model.safetensors")
    assert all(
        torch.equal(value, saved[name]) for name, value in load_file(text_encoder / "model.safetensors").items()
    )
    pipe = tonefield.load(str(folder))
    pipe.set_progress_bar_config(disable=True)
    assert pipe(prompt="high", num_frames=6, num_inference_steps=2).audios.shape == (1, 6)
    with pytest.raises(UserError, match="has no column 'story'; it has"):
        train(tmp_path / "refused", captioned, network, *flags, "--caption_column=story")
    with pytest.raises(UserError, match=r"^--text_encoder .*nowhere cannot be loaded"):
        train(tmp_path / "refused", captioned, network, f"--text_encoder={tmp_path / 'nowhere'}")


@pytest.mark.slow
def test_texts_are_learned(captioned, network, text_encoder, tmp_path):
    flags = ("--no-class_conditional", "--max_train_steps=60", "--learning_rate=0.01", "--train_batch_size=16")
    folder = train(tmp_path, captioned, network, f"--text_encoder={text_encoder}", *flags,
                   "--gradient_accumulation_steps=1")  # fmt: skip
    pipe = tonefield.load(str(folder))
    pipe.set_progress_bar_config(disable=True)
    made = pipe(prompt=["very low", "high"] * 8, num_frames=6, num_inference_steps=6, generator=torch.manual_seed(0))
    codes = np.asarray(made.tokens)[:, 0]
    assert (codes[::2] == 3).mean() > 0.9 and (codes[1::2] == 12).mean() > 0.9


# ----- what is learned


def periodic(sequences: np.ndarray) -> np.ndarray:
    return (sequences.reshape(len(sequences), -1, 5) == sequences[:, None, :5]).all(axis=(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["true", "permuted"])
def test_a_grammar_is_learned(tmp_path, labels):
    """
    Five codes over and over, each one of the four of its class: 5 ln 4 nats for 20 codes. No model knows less than
    that; one that was told wrong classes knows neither, and makes what does not belong to them.
    """
    rng = np.random.default_rng(0)
    codes = {str(kind): motifs(kind, 400, rng) for kind in range(4)}
    if labels == "permuted":
        rows = rng.permutation(np.concatenate(list(codes.values())))
        codes = {str(kind): rows[400 * kind : 400 * (kind + 1)] for kind in range(4)}
    data = tokenize(write_sounds(tmp_path / "sounds", codes), make_codec(tmp_path / "codec"), tmp_path / "data",
                    "--validation_fraction=0.1")  # fmt: skip
    (tmp_path / "net.yaml").write_text("hidden_size: 64\nnum_layers: 3\nnum_heads: 2\ncond_dim: 32\n")
    flags = ("--train_batch_size=64", "--gradient_accumulation_steps=1", "--max_train_steps=800", "--dropout=0",
             "--learning_rate=0.003", "--lr_scheduler=cosine", "--lr_warmup_steps=50", "--ema_max_decay=0.98",
             "--t_sampling=mask_count", "--validation_steps=800", "--num_validation_draws=16", "--logging_steps=100",
             "--num_validation_samples=0", "--label_dropout=0.05")  # fmt: skip
    folder = train(tmp_path / "out", data, tmp_path / "net.yaml", *flags)
    bound = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["validation_loss"]
    pipe = tonefield.load(str(folder))
    pipe.set_progress_bar_config(disable=True)
    told = np.arange(200) % 4
    made = pipe(class_labels=told, num_frames=20, num_inference_steps=20, generator=torch.manual_seed(0))
    made = np.asarray(made.tokens)[:, 0]
    valid = periodic(made) & (made // 4 == told[:, None]).all(axis=1)
    entropy = 5 * math.log(4) / 20
    if labels == "true":
        assert entropy < bound < 1.06 * entropy
        assert valid.mean() > 0.95
        assert len({tuple(row) for row in made.tolist()}) > 150  # not a few that it knows by heart
    else:
        assert bound > entropy + 0.8 * math.log(4) / 20
        assert valid.mean() < 0.5


# ----- what is refused


def refuse(capsys, message, *argv):
    """A flag that is refused when it is read: status 2 and one line."""
    with pytest.raises(SystemExit) as exit:
        train_sedd.parse_args(list(argv))
    assert exit.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_bad_flags(capsys):
    need = "--dataset_name=x"
    refuse(capsys, "--dataset_name is needed: a folder made by audio_to_tokens.py, or a Hub id")
    for flag, message in {
        "--seq_length=0": "--seq_length is at least 1, not 0",
        "--num_validation_draws=0": "--num_validation_draws is at least 1",
        "--num_inference_steps=0": "--num_inference_steps is at least 1",
        "--prompt_dropout=1": "--prompt_dropout lies between 0 and 1",
        "--sigma_max=3": "--sigma_max has no meaning with --noise_schedule loglinear",
        "--train_batch_size=0": "--train_batch_size is at least 1, not 0",
    }.items():
        refuse(capsys, message, need, flag)
    refuse(
        capsys, "--eps has no meaning with --noise_schedule geometric", need, "--eps=0.1", "--noise_schedule=geometric"
    )
    refuse(capsys, "mask_count has no meaning with --graph_type uniform", need, "--graph_type=uniform",
           "--t_sampling=mask_count")  # fmt: skip


def with_codes(dataset: Path, folder: Path, change) -> Path:
    """A dataset with other codes."""
    splits = datasets.load_from_disk(str(dataset))
    rows = [row | {"codes": change(row["codes"])} for row in splits["train"]]
    splits["train"] = datasets.Dataset.from_list(rows, features=splits["train"].features)
    splits.save_to_disk(folder)
    shutil.copytree(dataset / "codec", folder / "codec")
    return folder


def test_bad_datasets(tokens, network, tmp_path):
    def refused(message, dataset, *flags):
        with pytest.raises(UserError, match=message) as caught:
            train(tmp_path / "out", dataset, network, *flags)
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "out").glob("[!.]*"))

    refused("nowhere cannot be loaded", tmp_path / "nowhere")
    datasets.Dataset.from_dict({"codes": [[[1]]]}).save_to_disk(tmp_path / "alien")
    refused(
        r"no column 'front_end' with the settings of its front end: make it with audio_to_tokens.py",
        tmp_path / "alien",
    )
    rows = datasets.load_from_disk(str(tokens))
    mels = rows["train"].remove_columns(RECORD_COLUMN)
    mels = mels.add_column(RECORD_COLUMN, [0] * len(mels), feature=record_feature({"format": "tonefield-mel"}))
    mels.save_to_disk(tmp_path / "mels")
    refused(r"holds no tokens: the record of its front end is tonefield-mel. Make tokens with", tmp_path / "mels")

    mask = with_codes(tokens, tmp_path / "mask", lambda codes: [[*codes[0][:-1], CODES]])
    refused(r"has a code 16, the mask, which its codec does not have: they lie in 0..15", mask)
    beyond = with_codes(tokens, tmp_path / "beyond", lambda codes: [[*codes[0][:-1], 99]])
    refused(r"has a code 99 which its codec does not have", beyond)
    refused(r"has a code 99 which its codec does not have", beyond, "--streaming")
    empty = tmp_path / "empty"
    datasets.DatasetDict({"train": rows["train"].select([])}).save_to_disk(empty)
    shutil.copytree(tokens / "codec", empty / "codec")
    refused("'train' of .*empty has no rows", empty)

    shutil.copytree(tokens, tmp_path / "other")
    MuLawTokenizer(8000, mu=14).save_pretrained(tmp_path / "other" / "codec")
    fingerprints = MuLawTokenizer(8000, mu=14).fingerprint(), MuLawTokenizer(8000, mu=15).fingerprint()
    refused(f"is MuLawTokenizer {fingerprints[0]}, the tokens of .* were made by MuLawTokenizer {fingerprints[1]}",
            tmp_path / "other")  # fmt: skip
    shutil.rmtree(tmp_path / "other" / "codec")
    refused("The codec of .*other cannot be loaded", tmp_path / "other")

    refused(
        r"--seq_length 19 is longer than any recording of .*: the longest has 18 frames", tokens, "--seq_length=19"
    )
    refused("has no column 'genre' of classes", tokens, "--class_conditional", "--class_column=genre")
    datasets.DatasetDict({"train": rows["train"]}).save_to_disk(tmp_path / "train-only")
    shutil.copytree(tokens / "codec", tmp_path / "train-only" / "codec")
    refused("has no split 'validation'; it has train.*--validation_steps 0", tmp_path / "train-only",
            "--validation_steps=2")  # fmt: skip


def test_bad_networks_and_runs(tokens, pairs, usual, network, tmp_path):
    def refused(message, dataset, config, *flags):
        (tmp_path / "net.yaml").write_text(config)
        with pytest.raises(UserError, match=message):
            train(tmp_path / "out", dataset, tmp_path / "net.yaml", *flags)

    refused("num_classes 11, the dataset and the flags want 2", tokens, "num_classes: 11")
    refused("vocab_size 17, the dataset and the flags want 16", tokens, "vocab_size: 17")
    refused("must consist of the arguments", tokens, "[1]")
    refused("cannot be built: hidden_size 30 must be a multiple", tokens, "hidden_size: 30")
    refused("cannot be built: .*depth", tokens, "depth: 3")
    refused("cannot be built: The uniform graph .* layout 'flatten' forbids", pairs, TINY, "--layout=flatten",
            "--graph_type=uniform")  # fmt: skip
    refused("sigma_min is 5.0, sigma_max 2.0", tokens, TINY, "--noise_schedule=geometric", "--sigma_min=5",
            "--sigma_max=2")  # fmt: skip
    refused("sampling_eps is 0.0", tokens, TINY, "--sampling_eps=0")

    resume = f"--resume_from_checkpoint={usual / 'checkpoint-2'}"
    refused("codec MuLawTokenizer .*, this run has MuLawTokenizer .*: they must be equal", pairs, TINY, resume)
    refused("sequence length 18, this run has 6", tokens, TINY, resume, "--seq_length=6")
    refused("network .* they must be equal", tokens, TINY.replace("32", "64"), resume)
    refused("scheduler .* they must be equal", tokens, TINY, resume, "--noise_schedule=cosine")
    refused("t sampling stratified, this run has uniform", tokens, TINY, resume, "--t_sampling=uniform")
    refused(r"classes .'high', 'low'., this run has ..: ", tokens, TINY, resume, "--no-class_conditional")
    assert list((tmp_path / "out").glob("[!.]*")) == []


@pytest.mark.parametrize("recipe", ["fsdd-tokens-cpu", "sedd-music"])
def test_recipes_are_read(recipe):
    args = train_sedd.parse_args([f"--config={ROOT / 'recipes' / recipe}.yaml", "--dataset_name=x"])
    assert args.max_train_steps > 1 and args.seq_length > 1
