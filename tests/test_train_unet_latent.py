"""train_unet.py on latents and captions: what the network sees and is told, and what comes of it."""

import itertools
import json
import random
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from small_t5 import small_text_encoder, small_tokenizer
from training_runs import RECIPE, ROOT, differences, make_dataset, make_sounds, reset_accelerate, train
from transformers import T5EncoderModel

import tonefield
from tonefield import LatentAudioDiffusionPipeline, train_unet, train_vae
from tonefield.command_line import UserError
from tonefield.models import MelSpectrogram
from tonefield.pipelines import encode_text
from tonefield.training.data import Shares, open_data
from tonefield.training.latents import draw_latents, encode_on_the_fly
from tonefield.training.randomness import make_generators, uniform
from tonefield.training.text import (
    ReadTokens,
    Texts,
    add_texts,
    captions_of,
    encode_texts,
    open_text_encoder,
    some_captions,
)


CAPTIONS = ["a low tone", "a high tone", "a very high tone"]
RUN = ("--max_train_steps=2", "--gradient_accumulation_steps=1", "--num_validation_samples=0")


def write_captions(sounds, caption=lambda file: f"a {file.parent.name} tone"):
    files = sorted(sounds.rglob("*.wav"))
    lines = [f"{file.relative_to(sounds)},{caption(file)}" for file in files]
    (sounds / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]) + "\n")
    return sounds


def make_text_encoder(folder, captions=CAPTIONS, **kwargs):
    tokenizer = small_tokenizer(captions, **kwargs)
    tokenizer.save_pretrained(folder)
    small_text_encoder(tokenizer).save_pretrained(folder)
    return folder


def make_vae(dataset, folder, *flags):
    """An autoencoder and its latents; returns the folder of the former."""
    config, flags = ROOT / "recipes" / "test-tiny-vae.yaml", (f"--cache_latents={folder}-latents", *flags)
    return train(folder, dataset, "--max_train_steps=1", *flags, config=config, script=train_vae)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return make_text_encoder(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def mels(tmp_path_factory):
    """19 mels of 16 x 16 to train on, 5 held out; the low ones have a caption, the high ones two."""
    folder = tmp_path_factory.mktemp("captioned")
    sounds = make_sounds(folder / "sounds")
    write_captions(sounds, lambda file: CAPTIONS[(file.parent.name == "high") * (1 + int(file.stem) % 2)])
    return make_dataset(sounds, folder / "data")


@pytest.fixture(scope="module")
def vae(mels, tmp_path_factory):
    return make_vae(mels, tmp_path_factory.mktemp("vae") / "vae", "--latent_dims=8,8")


@pytest.fixture(scope="module")
def latents(vae):
    return vae.parent / "vae-latents"


def parsed(dataset, *flags):
    return train_unet.parse_args([f"--config={RECIPE}", f"--dataset_name={dataset}", *flags])


def opened(dataset, words, *flags):
    """Data with the states of its captions, as the script makes them."""
    args = parsed(dataset, f"--text_encoder={words}", *flags)
    data = open_data(args, args.caption_column)
    tokenizer, encoder = open_text_encoder(args)
    return args, data, tokenizer, encoder, add_texts(args, data, tokenizer, encoder, "cpu", False)


# ----- what comes of it


@pytest.mark.parametrize("objective", ["pfgmpp", "v_prediction"])
def test_from_captions_to_sound(latents, vae, words, tmp_path, objective):
    flags = [f"--objective={objective}", f"--text_encoder={words}", *RUN]
    flags += ["--aug_dim=5"] if objective == "pfgmpp" else ["--validation_steps=2", "--num_validation_samples=3"]
    folder = train(tmp_path, latents, *flags)
    pipe = tonefield.load(str(folder))
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is LatentAudioDiffusionPipeline
    for part, source in (("vae", vae / "vae"), ("text_encoder", words)):
        saved, given = (load_file(next(place.glob("*.safetensors"))) for place in (folder / part, source))
        assert all(torch.equal(saved[name], value) for name, value in given.items())
    average = load_file(folder / "checkpoint-2" / "unet_ema" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(pipe.unet.state_dict()[name], value) for name, value in average.items())
    assert pipe.mel.config.std == MelSpectrogram.from_pretrained(vae, subfolder="mel").config.std != 1
    # Latents know no range.
    c = pipe.scheduler.config
    assert not c.get("clip_sample") and c.get("prediction_type") == {"pfgmpp": "edm"}.get(objective, objective)
    if objective == "pfgmpp":  # any D
        assert (c.aug_dim, c.sigma_data) == (5, 1.0)

    def heard(*prompts):
        generators = [torch.Generator().manual_seed(0) for _ in prompts]
        return pipe(list(prompts), num_inference_steps=3, generator=generators).audios

    low, high = heard(*CAPTIONS[:2])
    assert np.isfinite(low).all() and low.std() > 0 and len(low) == pipe.mel.slice_samples
    np.testing.assert_allclose(heard(*CAPTIONS[1::-1]), [high, low], atol=1e-4)
    assert abs(low - high).max() > 1e-4
    if objective == "v_prediction":
        names = sorted(path.name for path in (folder / "samples").iterdir())
        assert names == [*(f"step-0000002-{index}.wav" for index in range(3)), "step-0000002.png"]


def test_text_without_an_autoencoder_and_the_other_way_round(mels, latents, words, tmp_path):
    flags = ("--max_train_steps=1", "--validation_steps=1", "--num_validation_samples=1")
    pipe = tonefield.load(str(train(tmp_path / "mels", mels, f"--text_encoder={words}", *flags)))
    assert type(pipe) is LatentAudioDiffusionPipeline and pipe.vae is None
    assert pipe.scheduler.config.sigma_data == 0.5
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(pipe("a low tone", num_inference_steps=2).audios).all()
    pipe = tonefield.load(str(train(tmp_path / "latents", latents, "--objective=epsilon", *flags)))
    assert type(pipe) is LatentAudioDiffusionPipeline and pipe.text_encoder is None
    assert pipe.scheduler.config.clip_sample is False and pipe.scheduler.config.prediction_type == "epsilon"
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(pipe(num_inference_steps=2).audios).all()


def test_resumed_equals_uninterrupted(mels, vae, words, tmp_path):
    flags = (f"--vae={vae}", f"--text_encoder={words}", "--num_validation_samples=2", "--prompt_dropout=0.5")
    flags += ("--validation_steps=4", "--validation_metrics", "fad")
    flags += ("--gradient_accumulation_steps=1", "--max_train_steps=4", "--checkpointing_steps=2")
    whole = train(tmp_path / "whole", mels, *flags)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    parts = train(tmp_path / "parts", mels, *flags, "--resume_from_checkpoint=latest", "--gradient_checkpointing")
    assert differences(whole / "checkpoint-4", parts / "checkpoint-4") == []
    other = make_text_encoder(tmp_path / "other", max_length=12)
    with pytest.raises(UserError, match="text encoder"):
        train(tmp_path / "parts", mels, *flags, f"--text_encoder={other}", "--resume_from_checkpoint=latest")


# ----- what the network sees


def test_latents_on_the_fly_are_those_of_the_dataset(mels, latents, vae):
    """But for the float16 of the dataset: the same noise is drawn for the same position."""
    args = parsed(mels, f"--vae={vae}", "--validation_steps=1")
    data = open_data(args)
    coder = encode_on_the_fly(args, data)
    cached = open_data(parsed(latents))
    positions = list(range(17, 23))
    batch, ready = data.train.get(positions), cached.train.get(positions)
    made = draw_latents(coder, batch["clean"], batch["posterior_noise"])
    torch.testing.assert_close(made, ready["clean"], rtol=2e-3, atol=2e-3)
    assert data.sample_shape == cached.sample_shape == (4, 8, 8) and data.sigma_data == cached.sigma_data == 1
    assert data.describe() == cached.describe()
    # By diffusers alone: its own draws have the same law.
    posterior = AutoencoderKL.from_pretrained(vae, subfolder="vae").encode(batch["clean"]).latent_dist
    shift, scale = coder.config.shift_factor, coder.config.scaling_factor
    noise = (made / scale + shift - posterior.mean) / posterior.std
    torch.testing.assert_close(noise, batch["posterior_noise"], rtol=0, atol=1e-4)
    assert not made.requires_grad
    assert next(data.validation_batches(2))["posterior_noise"].shape == (2, 4, 8, 8)


@pytest.mark.parametrize("objective", ["pfgmpp", "stable_target"])
def test_the_loss_on_the_fly_is_that_of_the_dataset(mels, latents, vae, objective):
    reset_accelerate()
    losses, positions = [], list(range(6))
    for dataset, flags in ((latents, ()), (mels, (f"--vae={vae}",))):
        args = parsed(dataset, f"--objective={objective}", *flags)
        data = open_data(args)
        coder = encode_on_the_fly(args, data) if flags else None
        unet, scheduler = train_unet.make_unet(args, data), train_unet.make_scheduler(args, data)
        compute_loss = train_unet.make_loss(args, scheduler, data, Accelerator(), coder)
        losses.append(compute_loss(unet.train(), data.train.get(positions), make_generators(0, "noise", positions)))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-3)
    losses[1].backward()
    assert not any(parameter.grad is not None for parameter in coder.parameters())


def test_the_front_end_of_the_autoencoder_counts(mels, vae, tmp_path):
    """Its mean and spread are what it was trained with; those of another dataset are not."""
    mel = MelSpectrogram.from_pretrained(vae, subfolder="mel")
    other = MelSpectrogram(**{k: v for k, v in mel.config.items() if k[0] != "_"} | {"mean": -0.25, "std": 0.75})
    shutil.copytree(vae / "vae", tmp_path / "vae")
    other.save_pretrained(tmp_path / "mel")
    args = parsed(mels, f"--vae={tmp_path}")
    data = open_data(args)
    before = data.train.get([0])["clean"]
    stored = data.mel.unstandardize(before)
    encode_on_the_fly(args, data)
    torch.testing.assert_close(data.train.get([0])["clean"], (stored + 0.25) / 0.75)
    assert data.mel.config.std == 0.75
    # An autoencoder alone takes mels as the dataset has them.
    args, data = parsed(mels, f"--vae={vae / 'vae'}"), open_data(parsed(mels))
    encode_on_the_fly(args, data)
    assert torch.equal(data.train.get([0])["clean"], before)


# ----- what it is told


def listen_to(encoder):
    """The tokens of the texts that an encoder is given from now on."""
    seen = []
    encoder.register_forward_hook(lambda _, args, output: seen.extend(args[0].tolist()))
    return seen


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "tonefield-captions"


def test_each_caption_is_encoded_once_as_the_pipeline_does(mels, words, cache):
    args = parsed(mels, f"--text_encoder={words}")
    data = open_data(args, args.caption_column)
    assert not data.class_names
    tokenizer, encoder = open_text_encoder(args)
    seen = listen_to(encoder)
    texts = add_texts(args, data, tokenizer, encoder, "cpu", False)
    batch = data.train.get(list(range(40)))
    assert len(seen) == 4  # three captions and none, whatever is read
    rows = [data.train.rows[data.train.row_of(position)]["caption"] for position in range(40)]
    assert set(rows) == set(CAPTIONS)
    states, mask = encode_text(tokenizer, encoder, [str(row) for row in rows])
    assert torch.equal(batch["text_mask"], mask)
    torch.testing.assert_close(batch["text_states"], states, rtol=0, atol=1e-5)
    alone = texts([CAPTIONS[0], CAPTIONS[0]])
    assert alone["text_mask"].all()
    assert set(some_captions(data, "caption", 5)) == set(CAPTIONS)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_texts_are_encoded_once_for_all_runs(words, cache):
    """In files of Arrow; what is read from there is what was encoded, bit for bit."""
    args = parsed("x", f"--text_encoder={words}")

    def encoded(texts, change=None):
        tokenizer, encoder = open_text_encoder(args)
        if change:
            change(tokenizer, encoder)
        seen = listen_to(encoder)
        made = encode_texts(tokenizer, encoder, texts, "cpu", False)
        assert made.places.keys() == {"", *texts}
        return len(seen), made(["", *texts])

    tokenizer, encoder = open_text_encoder(args)
    states, mask = encode_text(tokenizer, encoder, ["", *CAPTIONS])  # in memory, all at once
    first, again = encoded(CAPTIONS * 2), encoded(CAPTIONS * 2)
    assert (first[0], again[0]) == (4, 0)
    for made in (first[1], again[1]):
        assert torch.equal(made["text_states"], torch.cat([states, states[1:]]))
        assert torch.equal(made["text_mask"], torch.cat([mask, mask[1:]]))
    count, more = encoded(["a drum", CAPTIONS[1], "a drum"])
    assert count == 1  # only the new text; from two files
    torch.testing.assert_close(
        more["text_states"], encode_text(tokenizer, encoder, ["", "a drum", CAPTIONS[1], "a drum"])[0]
    )
    assert torch.equal(more["text_states"][2, : mask[2].sum()], states[2][mask[2]])
    folders = list(cache.iterdir())
    assert len(folders) == 1 and len(list(folders[0].glob("*.arrow"))) == 2 and not list(folders[0].glob(".*"))

    def other_weights(tokenizer, encoder):
        encoder.shared.weight.data[5] += 1

    def other_words(tokenizer, encoder):
        vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary["model"]["vocab"][4:6] = vocabulary["model"]["vocab"][5:3:-1]
        tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(vocabulary))

    for change in (other_weights, other_words):
        assert [encoded(CAPTIONS, change)[0] for _ in range(2)] == [4, 0]
    assert len(list(cache.iterdir())) == 3


def test_a_second_run_encodes_nothing(mels, words, cache, tmp_path, monkeypatch):
    flags = (f"--text_encoder={words}", "--max_train_steps=1", "--num_validation_samples=0")
    first = train(tmp_path / "first", mels, *flags)
    monkeypatch.setattr(T5EncoderModel, "forward", lambda *_, **__: pytest.fail("it encodes again"))
    second = train(tmp_path / "second", mels, *flags)
    assert differences(first / "checkpoint-1", second / "checkpoint-1") == []


def test_a_stream_is_told_the_same(mels, words, tmp_path):
    """Texts that are encoded with each batch; the loss is that of the rows in memory."""
    flags = (f"--text_encoder={words}", "--validation_steps=1", "--prompt_dropout=0.4")
    stream_args, data, _, encoder, texts = opened(mels, words, *flags, "--streaming", "--shuffle_buffer=8")
    assert texts.places.keys() == {"", *map(str, data.validation["caption"])}  # those that come are not known
    args, known, *_, known_texts = opened(mels, words, *flags)
    reset_accelerate()
    accelerator = Accelerator()
    unet, scheduler = train_unet.make_unet(args, known, 16), train_unet.make_scheduler(args, known)
    of_stream = train_unet.make_loss(stream_args, scheduler, data, accelerator, texts=texts, encoder=encoder)
    of_rows = train_unet.make_loss(args, scheduler, known, accelerator, texts=known_texts)
    rows = known.train.rows.with_format("torch")
    for batch in itertools.islice(data.train.batches(Shares(6), 0), 4):
        positions = batch["positions"]
        where = [int((known.mel.standardize(rows["mel"][:]) - clean).abs().amax((1, 2, 3)).argmin())
                 for clean in batch["clean"]]  # fmt: skip
        same = known.train.read(known.train.rows[where], positions)
        assert torch.equal(same["clean"], batch["clean"]) and "text_states" not in batch
        unet.train()
        losses = []
        for loss, seen in ((of_stream, batch), (of_rows, same)):
            torch.manual_seed(0)
            losses.append(loss(unet, seen, make_generators(0, "noise", positions)))
        torch.testing.assert_close(losses[0], losses[1])
    folder = train(
        tmp_path, mels, *flags, "--streaming", "--max_train_steps=2", "--num_validation_samples=2",
        "--dataloader_num_workers=1",
    )  # fmt: skip
    assert len(list((folder / "samples").glob("*.wav"))) == 4
    read = ReadTokens(data.read, "caption", small_tokenizer(CAPTIONS, max_length=3))
    with pytest.raises(UserError, match="a row of the stream has no text in 'caption'"):
        read({"mel": rows["mel"][:1], "caption": [" "]}, [0])


def test_withheld_texts_are_the_empty_one(latents, words):
    args, data, tokenizer, encoder, texts = opened(latents, words, "--prompt_dropout=0.5", "--objective=epsilon")
    scheduler = train_unet.make_scheduler(args, data)
    assert scheduler.config.clip_sample is False
    told = []

    class Network(torch.nn.Module):
        def forward(self, x, timestep, encoder_hidden_states, encoder_attention_mask):
            told.append((encoder_hidden_states, encoder_attention_mask))
            return SimpleNamespace(sample=x)

    network, positions = Network(), list(range(24))
    batch = data.train.get(positions)
    compute_loss = train_unet.make_loss(args, scheduler, data, Accelerator(), texts=texts)
    for network.training in (True, False):
        compute_loss(network, batch, make_generators(0, "noise", positions))
    withheld = uniform(24, make_generators(0, "noise", positions)) < 0.5
    assert 4 < withheld.sum() < 20
    (states, mask), (all_states, all_mask) = told
    assert torch.equal(all_states, batch["text_states"]) and torch.equal(all_mask, batch["text_mask"])
    null, there = encode_text(tokenizer, encoder, "")
    tokens = null.shape[1]
    torch.testing.assert_close(states[withheld][:, :tokens], null.expand(withheld.sum(), -1, -1), rtol=0, atol=1e-5)
    assert (mask[withheld].sum(dim=1) == there.sum()).all() and not states[withheld][:, tokens:].any()
    assert torch.equal(states[~withheld], all_states[~withheld]) and torch.equal(mask[~withheld], all_mask[~withheld])


def test_sizes(latents):
    """Every size reads text, and is larger than the one before."""
    counts = []
    for size in train_unet.MODEL_SIZES:
        args = parsed(latents, f"--model_size={size}")
        data = SimpleNamespace(sample_shape=(4, 16, 32), class_names=[], vae={"any": 1}, mel=None)
        with torch.device("meta"):
            unet = train_unet.make_unet(args, data, 512)
        assert type(unet).__name__ == "UNet2DConditionModel"
        heads = [block.attentions[0].num_attention_heads if hasattr(block, "attentions") else 0
                 for block in unet.down_blocks]  # fmt: skip
        width = train_unet.MODEL_SIZES[size]["head_dim"]
        channels = unet.config.block_out_channels
        assert heads[0] == 0 and heads[-1] == max(1, channels[-1] // width)
        counts.append(sum(parameter.numel() for parameter in unet.parameters()))
    assert all(2 * small < large for small, large in itertools.pairwise(counts))


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*text*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_read(recipe):
    args = train_unet.parse_args([f"--config={recipe}", "--dataset_name=x"])
    assert args.text_encoder
    data = SimpleNamespace(sample_shape=(4, 16, 16), class_names=[], vae={"any": 1}, mel=None)
    with torch.device("meta"):
        assert type(train_unet.make_unet(args, data, 512)).__name__ == "UNet2DConditionModel"


def test_a_network_of_ones_own(latents, words, tmp_path):
    args, data, *_ = opened(latents, words, f"--model_config={tmp_path / 'net.yaml'}")
    usual = "block_out_channels: [8, 8]\ndown_block_types: [CrossAttnDownBlock2D, DownBlock2D]\n"
    usual += "up_block_types: [UpBlock2D, CrossAttnUpBlock2D]\nnorm_num_groups: 4\nlayers_per_block: 1\n"
    (tmp_path / "net.yaml").write_text(usual)
    unet = train_unet.make_unet(args, data, 16)
    assert type(unet).__name__ == "UNet2DConditionModel" and unet.config.cross_attention_dim == 16
    for config, message in {
        usual + "cross_attention_dim: 32\n": "wants 16",
        "_class_name: UNet2DModel\n": "does not read text",
    }.items():
        (tmp_path / "net.yaml").write_text(config)
        with pytest.raises(UserError, match=message):
            train_unet.make_unet(args, data, 16)


# ----- what is refused


def test_bad_flags(capsys):
    for flags, message in {
        ("--vae=x", "--image_column=image"): "--vae belongs to mels",
        ("--text_encoder=x", "--class_conditional"): "--class_conditional does not go with --text_encoder",
        ("--text_encoder=x", "--objective=field"): "--objective field knows classes",
        ("--vae=x", "--objective=stable_target", "--field_batch_size=64"): "wants latents without --vae",
        ("--prompt_dropout=1",): "--prompt_dropout lies between 0 and 1",
    }.items():
        with pytest.raises(SystemExit):
            train_unet.parse_args(["--dataset_name=x", *flags])
        assert message in capsys.readouterr().err


def test_bad_data(mels, latents, vae, words, tmp_path):
    def refused(message, dataset, *flags):
        with pytest.raises(UserError, match=message) as found:
            train(tmp_path / "refused", dataset, *flags)
        assert "\n" not in str(found.value)

    refused("has no column 'story'; it has", mels, f"--text_encoder={words}", "--caption_column=story")
    refused(r"^--text_encoder .*nowhere cannot be loaded", mels, f"--text_encoder={tmp_path / 'nowhere'}")
    refused(r"^--vae .*nowhere cannot be loaded", mels, f"--vae={tmp_path / 'nowhere'}")
    refused("holds latents, which know texts", latents, "--class_conditional")
    shutil.copytree(latents, tmp_path / "bare", ignore=shutil.ignore_patterns("vae"))
    refused("comes without its autoencoder, name it with --vae", tmp_path / "bare")
    refused(
        "4 times, which 8 x 8 latents does not allow. Use a dataset with multiples of 32",
        latents,
        "--model_config={block_out_channels: [8, 8, 8, 8, 8]}",
    )
    rows = datasets.Dataset.from_dict({"caption": ["a", " ", None, "b"]})
    with pytest.raises(UserError, match="2 of 4 rows of the split have no text in 'caption', the first is row 1"):
        captions_of(rows, "caption", "the split")

    # Another autoencoder than the one that made the latents; one of other mels; one that halves more often.
    shutil.copytree(vae, tmp_path / "vae", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((tmp_path / "vae" / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.18215}))
    refused("the latents of .* were made by", latents, f"--vae={tmp_path / 'vae'}")
    MelSpectrogram(8000, 512, 256, 16, 16).save_pretrained(tmp_path / "vae" / "mel")
    refused("trained on other mels .*: sample_rate 8000, not 4000", mels, f"--vae={tmp_path / 'vae'}")
    deep = ("DownEncoderBlock2D",) * 6, ("UpDecoderBlock2D",) * 6
    AutoencoderKL(1, 1, *deep, (4,) * 6, norm_num_groups=4).save_pretrained(tmp_path / "deep")
    refused("halves mels 5 times, which 16 x 16", mels, f"--vae={tmp_path / 'deep'}")


def test_long_captions_are_told_of_once(words, caplog):
    Accelerator()  # whose logger speaks for one process
    tokenizer = small_tokenizer(CAPTIONS, max_length=5)
    encoder = small_text_encoder(tokenizer)
    texts = encode_texts(tokenizer, encoder, ["l", *(f"a low tone {'very ' * n}end" for n in range(9, 99))], "cpu")
    assert isinstance(texts, Texts) and max(count for _, _, count in texts.places.values()) == 5
    assert len(caplog.records) == 1
    assert "90 of 91 different captions are longer than the 5 tokens" in caplog.text


def test_a_text_encoder_of_ones_own(tmp_path):
    """Different captions get different states, for equal seeds the same ones."""
    from tonefield.training.text import make_text_encoder

    made = []
    for name in ("first", "second"):
        make_text_encoder([*CAPTIONS, "", None], tmp_path / name, seed=3)
        tokenizer, encoder = open_text_encoder(parsed("x", f"--text_encoder={tmp_path / name}"))
        made.append(encode_text(tokenizer, encoder, CAPTIONS)[0])
        assert tokenizer.unk_token_id not in tokenizer(CAPTIONS).input_ids[0]
    assert torch.equal(*made)
    assert min((a - b).abs().max() for a, b in itertools.combinations(made[0], 2)) > 0.1
    with pytest.raises(ValueError, match="no captions"):
        make_text_encoder([" "], tmp_path / "none")


# ----- what is learned


def centroid(sounds, rate):
    power = torch.fft.rfft(torch.as_tensor(sounds)).abs().square()
    return (power * torch.linspace(0, rate / 2, power.shape[-1])).sum(-1) / power.sum(-1)


@pytest.mark.slow
def test_sounds_follow_the_prompt(tmp_path):
    """Two words are learned in the latents of an autoencoder; shuffled captions teach nothing."""
    sounds = make_sounds(tmp_path / "sounds", per_class=60)
    words = make_text_encoder(tmp_path / "t5", ["low", "high"])
    files = sorted(sounds.rglob("*.wav"))
    shuffled = dict(zip(files, random.Random(0).sample([file.parent.name for file in files], len(files)), strict=True))
    found, vae = {}, None
    for name, caption in (("right", lambda file: file.parent.name), ("wrong", shuffled.get)):
        mels = make_dataset(write_captions(sounds, caption), tmp_path / f"{name}-mels", "--hop_length=128")
        if vae is None:
            vae = train(
                tmp_path / "vae", mels, "--latent_dims=8,8", "--max_train_steps=300", "--train_batch_size=16",
                "--gradient_accumulation_steps=1", "--learning_rate=0.004", "--lr_warmup_steps=20",
                "--discriminator_weight=0", "--ema_max_decay=0.98", "--logging_steps=100",
                config=ROOT / "recipes" / "test-tiny-vae.yaml", script=train_vae,
            )  # fmt: skip
        folder = train(
            tmp_path / name, mels, f"--vae={vae}", f"--text_encoder={words}", "--max_train_steps=1000",
            "--train_batch_size=16", "--gradient_accumulation_steps=1", "--learning_rate=0.004", "--dropout=0",
            "--lr_warmup_steps=20", "--ema_max_decay=0.98", "--logging_steps=100",
        )  # fmt: skip
        pipe = tonefield.load(str(folder))
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in range(100)]
        made = pipe(["low", "high"] * 50, num_inference_steps=18, guidance_scale=1.0, generator=generators)
        high = centroid(made.audios, made.sampling_rate) > 750
        found[name] = (high == (torch.arange(100) % 2 == 1)).float().mean().item()
    print(found)
    assert found["right"] > 0.9
    assert 0.2 <= found["wrong"] <= 0.8
