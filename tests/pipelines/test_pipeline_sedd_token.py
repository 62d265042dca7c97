"""The token pipeline against laws that are known exactly, and on real codecs and networks."""

import numpy as np
import pytest
import torch
from exact_networks import quiet, seeds
from scipy.stats import chisquare
from token_networks import exact_table, lazy_walk, random_table
from token_networks import random_token_pipe as real_pipe
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

import tonefield
from tonefield import FSQCodec, MuLawTokenizer, ScoreEntropyScheduler, SEDDTokenPipeline, SEDDTransformer1DModel
from tonefield.models.token_layouts import apply_layout, undo_layout


def table_pipe(books=1, frames=3, classes=1, layout="parallel", vocab_size=3, **scheduler):
    """A pipeline that knows a law of `books * frames` tokens exactly, and the law."""
    table = random_table(vocab_size, books * frames, classes)
    transformer = exact_table(
        table, vocab_size, num_codebooks=books, layout=layout, num_classes=classes if classes > 1 else None
    )
    codec = MuLawTokenizer(sampling_rate=10, hop_length=books, mu=vocab_size - 1)
    return quiet(
        SEDDTokenPipeline(transformer, ScoreEntropyScheduler(vocab_size=vocab_size, **scheduler), codec)
    ), table


def walk_pipe(vocab_size=4, max_length=8):
    transformer = lazy_walk(vocab_size, max_length=max_length)
    codec = MuLawTokenizer(sampling_rate=10, mu=vocab_size - 1)
    return quiet(SEDDTokenPipeline(transformer, ScoreEntropyScheduler(vocab_size=vocab_size), codec))


def counts(tokens, vocab_size):
    """How often each sequence occurs among codes of shape (batch, codebooks, frames)."""
    sites = tokens.flatten(1)
    index = (sites * vocab_size ** torch.arange(sites.shape[1]).flip(0)).sum(1)
    return np.bincount(index.numpy(), minlength=vocab_size ** sites.shape[1])


def assert_law(observed, probabilities):
    expected = np.asarray(probabilities) * observed.sum()
    possible = expected > 0
    assert observed[~possible].sum() == 0
    assert chisquare(observed[possible], expected[possible]).pvalue > 1e-3


@pytest.fixture
def sound():
    time = torch.arange(256) / 8000
    return 0.4 * torch.sin(2 * torch.pi * 440 * time) + 0.2 * torch.sin(2 * torch.pi * 1300 * time)


# The law of what comes out


@pytest.mark.parametrize(("books", "frames"), [(1, 3), (2, 2)])
def test_law(books, frames):
    pipe, table = table_pipe(books, frames)
    tokens = pipe(20000, num_frames=frames, generator=torch.Generator().manual_seed(1), output_type="tokens").tokens
    assert tokens.shape == (20000, books, frames)
    assert_law(counts(tokens, 3), table[0])


def test_law_given_known_tokens():
    """Inpainting is exact: each kept token as it was, the rest of the law given the kept ones."""
    pipe, table = table_pipe(books=2, frames=2)
    known = torch.tensor([[[2, 0], [1, 0]]])
    result = pipe(
        20000, tokens=known, mask=[False, True], generator=torch.Generator().manual_seed(1), output_type="tokens"
    ).tokens
    assert (result[..., 0] == torch.tensor([2, 1])).all()
    law = table[0].reshape(3, 3, 3, 3)[2, :, 1, :]  # sites: codebook 0 at frames 0 and 1, then codebook 1
    assert_law(counts(result[..., 1:], 3), (law / law.sum()).flatten())


def test_a_mask_for_each_sound():
    pipe, table = table_pipe(frames=2)
    mask = torch.tensor([[True, False], [False, True]]).repeat(6000, 1)
    result = pipe(tokens=torch.tensor([[[0, 2]]]), mask=mask, generator=seeds(1)[0], output_type="tokens").tokens[:, 0]
    assert (result[0::2, 1] == 2).all() and (result[1::2, 0] == 0).all()
    law = table[0].reshape(3, 3)
    assert_law(np.bincount(result[0::2, 0], minlength=3), law[:, 2] / law[:, 2].sum())
    assert_law(np.bincount(result[1::2, 1], minlength=3), law[0] / law[0].sum())


def test_law_of_classes_and_guidance():
    """At one site the guided law is p_c^w p^(1 - w); 0 forgets the class, and no label is the null class."""
    pipe, table = table_pipe(frames=1, classes=2, vocab_size=5)
    null = table.mean(0)
    guided = table[1] ** 2.5 * null**-1.5
    for label, scale, law in ((1, 1.0, table[1]), (1, 0.0, null), (None, 1.0, null), (1, 2.5, guided / guided.sum())):
        tokens = pipe(
            8000, class_labels=label, guidance_scale=scale, num_frames=1, generator=seeds(3)[0], output_type="tokens"
        ).tokens
        assert_law(counts(tokens, 5), law)
    tokens = pipe(class_labels=[0, 1] * 6000, num_frames=1, generator=seeds(4)[0], output_type="tokens").tokens
    assert_law(counts(tokens[0::2], 5), table[0])
    assert_law(counts(tokens[1::2], 5), table[1])


def test_guidance_moves_no_mass_between_masks_and_tokens():
    """In float64, by probabilities: p^w q^(1 - w), normalised to the sum of e^logits of p."""
    towards, without = torch.randn(2, 3, 5, dtype=torch.float64, generator=seeds(0)[0])
    towards[0, 1] = without[0, 1] = -torch.inf
    p, q = (logits.exp() / logits.exp().sum(-1, keepdim=True) for logits in (towards, without))
    law = p**3 / torch.where(q > 0, q, 1) ** 2
    expected = law / law.sum(-1, keepdim=True) * towards.exp().sum(-1, keepdim=True)
    guided = ScoreEntropyScheduler(vocab_size=5).guide(towards, without, 3.0)
    torch.testing.assert_close(guided.exp(), expected)


def test_law_of_long_sounds():
    """Windows of 3 make a Markov chain of 7 exactly."""
    pipe = walk_pipe(vocab_size=3, max_length=3)
    tokens = pipe(12000, num_frames=7, overlap_in_s=0.1, generator=seeds(0)[0], output_type="tokens").tokens[:, 0]
    transition, law = pipe.transformer.transition, pipe.transformer.start
    for site in range(6):
        both = counts(tokens[:, None, site : site + 2], 3)
        assert_law(both, (law[:, None] * transition).flatten())
    third = counts(tokens[:, None, 1:4], 3)  # across the first seam
    assert_law(third, (law[:, None, None] * transition[:, :, None] * transition[None]).flatten())


@pytest.mark.parametrize("frames", [8, 20])
def test_loops_have_no_seam(frames):
    """Every step around the ring is one that the chain makes."""
    pipe = walk_pipe(max_length=8)
    overlap = dict(overlap_in_s=0.2) if frames > 8 else {}
    arguments = dict(batch_size=300, num_frames=frames, output_type="tokens", generator=seeds(0)[0], **overlap)
    around = pipe(loop=True, **arguments).tokens
    assert ((around - around.roll(1, -1)).abs() <= 1).all()
    straight = pipe(**arguments).tokens
    assert ((straight - straight.roll(1, -1)).abs() > 1).any()


def test_loops_keep_what_is_known():
    pipe, known = walk_pipe(), torch.tensor([[[0, 1, 2, 3, 3, 2, 2, 3]]])
    mask = torch.zeros(8, dtype=torch.bool)
    mask[[0, 1, 2]] = True
    result = pipe(50, tokens=known, mask=mask, loop=True, output_type="tokens", generator=seeds(0)[0]).tokens
    assert (result[..., 3:] == known[..., 3:]).all()
    # What is drawn again is a token on either side of the seam, and there the last is known.
    assert ((result - result.roll(1, -1)).abs() <= 1)[..., [0, 1, 2, 3]].all()


# Network calls


def test_no_more_calls_than_steps_or_unknown_tokens():
    pipe, _ = table_pipe(frames=6, vocab_size=2)
    for steps, expected in ((100, 6), (6, 6)):
        pipe.transformer.calls = 0
        pipe(16, num_frames=6, num_inference_steps=steps)
        assert pipe.transformer.calls == expected == pipe.num_timesteps
    pipe.transformer.calls = 0
    pipe(16, num_frames=6, num_inference_steps=2)
    assert pipe.transformer.calls <= 2
    known = torch.tensor([[[1, 0, 1, 1, 0, 0]]])
    pipe.transformer.calls = 0
    assert torch.equal(pipe(tokens=known, mask=[False] * 6, output_type="tokens").tokens, known)
    assert pipe.transformer.calls == 0
    pipe(tokens=known, mask=[True, True] + [False] * 4)
    assert pipe.transformer.calls == 2


def test_the_head_is_computed_where_tokens_are_revealed(monkeypatch):
    asked = []
    pipe = real_pipe(hop=1)
    forward = pipe.transformer.forward

    def watched(tokens, timestep, positions=None, **conditions):
        asked.append(tokens.shape[1] if positions is None else positions.shape[1])
        return forward(tokens, timestep, positions=positions, **conditions)

    monkeypatch.setattr(pipe.transformer, "forward", watched)
    pipe(num_frames=40, num_inference_steps=40)
    assert asked == [1] * 40


# Seeds


@pytest.mark.parametrize("layout", ["parallel", "flatten", "codebook_major"])
def test_a_sound_depends_on_its_own_seed_alone(layout):
    pipe = real_pipe(hop=2, layout=layout, num_classes=3)
    together = pipe(
        class_labels=[0, 1, 2], guidance_scale=2.0, num_frames=12, num_inference_steps=10, generator=seeds(5, 6, 7)
    )
    swapped = pipe(
        class_labels=[2, 0], guidance_scale=2.0, num_frames=12, num_inference_steps=10, generator=seeds(7, 5)
    )
    np.testing.assert_array_equal(swapped.tokens, together.tokens[[2, 0]])
    np.testing.assert_array_equal(swapped.audios, together.audios[[2, 0]])
    assert (together.tokens[0] != together.tokens[1]).any()


def test_a_sound_depends_on_its_own_seed_alone_in_long_edits():
    pipe, known = walk_pipe(max_length=4), torch.tensor([[[0, 1, 2, 3, 3, 2, 2, 3, 3, 3]]])
    masks = torch.zeros(2, 10, dtype=torch.bool)
    masks[0, 8:] = masks[1, 1:4] = True
    arguments = dict(tokens=known, overlap_in_s=0.1, output_type="tokens")
    both = pipe(mask=masks, generator=seeds(1, 2), **arguments).tokens
    for i in range(2):
        assert torch.equal(pipe(mask=masks[i], generator=seeds(1 + i), **arguments).tokens[0], both[i])


# Codes and sound


@pytest.mark.parametrize("layout", ["parallel", "flatten", "codebook_major"])
@pytest.mark.parametrize("predictor", ["event", "analytic", "remdm", "confidence"])
def test_only_codes_come_out(layout, predictor):
    pipe = real_pipe(hop=3, layout=layout)
    pipe.scheduler = ScoreEntropyScheduler.from_config(pipe.scheduler.config, predictor=predictor)
    result = pipe(2, num_frames=7, num_inference_steps=6, output_type="pt", generator=seeds(0)[0])
    assert result.tokens.shape == (2, 3, 7) and result.audios.shape == (2, 21)
    assert result.tokens.min() >= 0 and result.tokens.max() < 256
    torch.testing.assert_close(result.audios, pipe.audio_tokenizer.decode(result.tokens))


def test_uniform_graph():
    pipe = real_pipe(hop=2, graph_type="uniform", time_conditioning=True)
    result = pipe(2, num_frames=9, num_inference_steps=5)
    assert result.tokens.shape == (2, 2, 9) and result.tokens.max() < 256
    assert pipe.num_timesteps == 5


@pytest.mark.parametrize("layout", ["flatten", "codebook_major", "parallel"])
def test_layouts_are_those_of_the_datasets(layout):
    pipe = real_pipe(hop=3, layout=layout)
    codes = torch.randint(256, (2, 3, 5))
    tokens = pipe._to_tokens(codes)
    assert torch.equal(tokens, apply_layout(codes, layout, 256))
    assert torch.equal(pipe._to_codes(tokens), undo_layout(tokens, layout, 3, 256))
    assert torch.equal(pipe._to_codes(tokens), codes)


@pytest.mark.parametrize("layout", ["parallel", "flatten"])
def test_the_last_code_can_be_learnt_and_drawn(layout):
    """A vocabulary that is short by one makes the last code the mask."""
    pipe = real_pipe(hop=2, layout=layout)
    codes = torch.full((8, 2, 6), 255)
    codes[:, 0] = 254
    tokens = apply_layout(codes, layout, 256)
    pipe.transformer.train()
    optimizer = torch.optim.Adam(pipe.transformer.parameters(), 0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        t = torch.rand(8, generator=generator) * 0.999 + 0.001
        noisy = pipe.scheduler.add_noise(tokens, t, generator)
        loss = pipe.scheduler.loss(pipe.transformer(noisy).sample, noisy, tokens, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pipe.transformer.eval()
    generated = pipe(8, num_frames=6, output_type="tokens", generator=generator).tokens
    assert (generated == codes).float().mean() > 0.9
    kept = pipe(tokens=codes[:1], mask=[False] * 5 + [True], output_type="tokens").tokens
    assert torch.equal(kept[..., :5], codes[:1, :, :5])


@pytest.mark.parametrize(("given", "samples", "frames"), [
    (dict(audio_length_in_s=0.01), 80, 20), (dict(audio_length_in_s=0.0101), 81, 21), (dict(num_frames=5), 20, 5),
    ({}, 256, 64), (dict(audio_length_in_s=0.0101, loop=True), 84, 21),
    (dict(audio_length_in_s=0.05, overlap_in_s=0.008), 400, 100),
])  # fmt: skip
def test_lengths(given, samples, frames):
    result = real_pipe()(2, num_inference_steps=3, **given)
    assert result.audios.shape == (2, samples) and result.audios.dtype == np.float32
    assert result.tokens.shape == (2, 4, frames) and result.sampling_rate == 8000
    assert np.abs(result.audios).max() <= 1


# Editing


def test_kept_sound_comes_back_sample_for_sample(sound):
    sound = torch.cat([sound[64:], sound])
    mask = [(0.018, 0.022)]
    result = real_pipe(max_length=112)(2, audio=sound, mask=mask, generator=seeds(0, 1), output_type="pt").audios
    assert result.shape == (2, 448)
    assert torch.equal(result[0, :64], sound[:64]) and torch.equal(result[1, 256:], sound[256:])
    # New between samples 144 and 176, and a cross-fade of 80 samples on both sides
    assert (result[:, 144:176] != sound[144:176]).float().mean() > 0.9
    assert (result[0, 144:176] != result[1, 144:176]).float().mean() > 0.9
    # In the cross-fade the codec's own sound follows the kept one, so that nothing is heard of it.
    faded = torch.cat([result[:, 64:144], result[:, 176:256]], 1) - torch.cat([sound[64:144], sound[176:256]])
    assert 0 < faded.abs().max() < 0.02


def test_frames_that_are_new_in_part_are_new(sound):
    pipe = real_pipe()
    codes = pipe.audio_tokenizer.encode(sound[None], 8000)
    # Samples 42 to 57: frames 10 to 14 of 4 samples
    tokens = pipe(32, audio=sound, mask=[(42 / 8000, 58 / 8000)], output_type="tokens").tokens
    changed = (tokens != codes).any(dim=1).any(dim=0)
    assert changed.nonzero()[:, 0].tolist() == [10, 11, 12, 13, 14]


@pytest.mark.parametrize("layout", ["parallel", "flatten", "codebook_major"])
def test_kept_codes_come_back_in_every_layout(layout):
    codes, mask = torch.randint(256, (1, 3, 6)), torch.tensor([False, True, False, False, True, True])
    result = real_pipe(hop=3, layout=layout)(8, tokens=codes, mask=mask, output_type="tokens").tokens
    assert (result == codes)[..., ~mask].all()
    assert (result != codes)[..., mask].any(dim=0).all()


def test_continuation(sound):
    result = real_pipe()(audio=sound[:98], audio_length_in_s=0.02, output_type="pt")
    assert result.audios.shape == (1, 160) and result.tokens.shape == (1, 4, 40)
    assert torch.equal(result.audios[0, :18], sound[:18])
    codes = real_pipe().audio_tokenizer.encode(sound[None], 8000)
    assert torch.equal(result.tokens[..., :24], codes[..., :24])
    # The frame that holds the end is drawn, not the silence that completes it.
    others = real_pipe()(16, audio=sound[:98], audio_length_in_s=0.02, output_type="tokens").tokens
    assert (others[:, :, 24] != others[:1, :, 24]).any()


def test_new_sound_on_both_sides(sound):
    mask = [(0.0, 0.008), (0.024, 0.032)]
    audio = torch.cat([torch.zeros(64), sound[64:]])
    tokens = real_pipe()(audio=audio, mask=mask, output_type="tokens").tokens
    codes = real_pipe().audio_tokenizer.encode(audio[None], 8000)
    assert torch.equal(tokens[..., 16:48], codes[..., 16:48])
    assert (tokens[..., :16] != codes[..., :16]).any() and (tokens[..., 48:] != codes[..., 48:]).any()


def test_a_loop_of_given_sound(sound):
    result = real_pipe()(audio=sound, mask=[(0.02, 0.025)], loop=True, output_type="pt").audios
    assert result.shape == (1, 256) and torch.equal(result[0, 40:80], sound[40:80])
    # The cross-fade of 80 samples goes around the ring: 200 + 80 - 256
    assert torch.equal(result[0, 24:80], sound[24:80]) and not torch.equal(result[0, :24], sound[:24])
    bridged = real_pipe()(audio=sound, audio_length_in_s=0.04, loop=True, overlap_in_s=0.01, output_type="pt")
    assert bridged.audios.shape == (1, 320) and torch.equal(bridged.audios[0, 80:176], sound[80:176])


def test_loops_go_through_the_codec_as_rings():
    """A codec that sees its surroundings codes and decodes a turned loop as a turned loop."""
    torch.manual_seed(0)
    codec = FSQCodec(8000, 32, 128, (4, 4), width=16, encoder_layers=2, decoder_layers=2)
    transformer = SEDDTransformer1DModel(16, hidden_size=8, num_layers=1, num_heads=1)
    pipe = quiet(SEDDTokenPipeline(transformer, ScoreEntropyScheduler(vocab_size=16), codec))
    audio = 0.3 * torch.randn(1, 40 * 32)
    keep = dict(mask=[False] * 40, loop=True, output_type="pt")
    result, turned = pipe(audio=audio, **keep), pipe(audio=audio.roll(13 * 32, 1), **keep)
    assert torch.equal(turned.tokens, result.tokens.roll(13, 2)) and torch.equal(result.audios, audio)
    assert not torch.equal(codec.encode(audio, 8000), result.tokens)
    sounds = [pipe(tokens=tokens, **keep).audios for tokens in (result.tokens, turned.tokens)]
    torch.testing.assert_close(sounds[1], sounds[0].roll(13 * 32, 1), atol=1e-5, rtol=0)
    assert not torch.allclose(codec.decode(result.tokens), sounds[0], atol=1e-3)
    codec.head[1].bias.data += 5  # a codec that is too loud
    assert codec.decode(result.tokens).abs().max() > 1
    assert pipe(tokens=result.tokens, **keep).audios.abs().max() == 1


def test_long_sound_is_edited_in_windows(sound):
    audio = sound.repeat(2)
    result = real_pipe()(audio=audio, mask=[(0.012, 0.014), (0.05, 0.055)], overlap_in_s=0.008, output_type="pt")
    codes = real_pipe().audio_tokenizer.encode(audio[None], 8000)
    changed = (result.tokens != codes).any(dim=1)[0].nonzero()[:, 0]
    assert set(changed.tolist()) <= {*range(24, 28), *range(100, 110)} and len(changed) >= 12
    assert torch.equal(result.audios[0, 192:320], audio[192:320])


# Text


@pytest.fixture(scope="module")
def text_pipe():
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "loud": 3, "quiet": 4, "piano": 5, "drums": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )
    torch.manual_seed(0)
    config = T5Config(vocab_size=7, d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    pipe = real_pipe(hop=2, text_dim=12, num_classes=2)
    return quiet(SEDDTokenPipeline(
        pipe.transformer, pipe.scheduler, pipe.audio_tokenizer, tokenizer, T5EncoderModel(config).eval()
    ))  # fmt: skip


@torch.no_grad()
def test_conditions_reach_the_network(text_pipe, monkeypatch):
    seen = []
    forward = text_pipe.transformer.forward

    def watched(tokens, timestep, **conditions):
        seen.append(conditions)
        return forward(tokens, timestep, **conditions)

    monkeypatch.setattr(text_pipe.transformer, "forward", watched)
    arguments = dict(num_frames=4, num_inference_steps=2)
    text_pipe(prompt=["loud piano", "drums"], class_labels=1, guidance_scale=3.0, **arguments)
    states, words = (seen[-1][name] for name in ("encoder_hidden_states", "encoder_attention_mask"))
    assert words.tolist() == [[False] * 3, [False] * 3, [True] * 3, [True, True, False]]
    alone = text_pipe.text_encoder(torch.tensor([[6, 1]])).last_hidden_state[0]
    torch.testing.assert_close(states[3, :2], alone)
    assert seen[-1]["class_labels"].tolist() == [2, 2, 1, 1]
    text_pipe(3, prompt="drums", negative_prompt="piano", guidance_scale=3.0, **arguments)
    words = seen[-1]["encoder_attention_mask"]
    assert words.tolist() == [[True, True]] * 6 and seen[-1]["class_labels"].tolist() == [2] * 6
    piano = text_pipe.text_encoder(torch.tensor([[5, 1]])).last_hidden_state
    torch.testing.assert_close(
        seen[-1]["encoder_hidden_states"], torch.cat([piano.repeat(3, 1, 1), alone.repeat(3, 1, 1)])
    )
    text_pipe(**arguments)
    assert "encoder_hidden_states" not in seen[-1]
    text_pipe(prompt="drums", guidance_scale=0.0, **arguments)
    assert "encoder_hidden_states" not in seen[-1]
    text_pipe(prompt=["", "drums"], **arguments)  # as in training, where an empty caption is none
    assert seen[-1]["encoder_attention_mask"].any(dim=1).tolist() == [False, True]


def test_prompts_change_the_sound(text_pipe):
    arguments = dict(num_frames=8, num_inference_steps=8)
    same = [text_pipe(prompt=prompt, generator=seeds(0), **arguments).tokens for prompt in ("piano", "piano", "drums")]
    assert (same[0] == same[1]).all() and (same[0] != same[2]).any()
    both = text_pipe(prompt=["drums", "piano"], generator=seeds(0, 0), **arguments).tokens
    np.testing.assert_array_equal(both, np.concatenate([same[2], same[0]]))


def test_long_prompts_are_cut_aloud(text_pipe, caplog):
    tonefield_logger = "tonefield.pipelines.pipeline_sedd_token"
    with caplog.at_level("WARNING", tonefield_logger):
        text_pipe(prompt="piano " * 20, num_frames=2)
    assert "reads the first 8 tokens of 'piano piano" in caplog.text


# What a user sees


def test_callback():
    shown = []

    def callback(pipe, step, timestep, given):
        shown.append((step, timestep.shape, given["tokens"].clone()))
        return {"tokens": torch.where(given["tokens"] == 1, 0, given["tokens"])}

    pipe, _ = table_pipe(frames=4, vocab_size=2)
    tokens = pipe(3, num_frames=4, callback_on_step_end=callback, output_type="tokens").tokens
    assert (tokens == 0).all()
    assert [step for step, _, _ in shown] == [0, 1, 2, 3] and shown[0][1] == (3,)
    assert [(tokens == 2).sum().item() for _, _, tokens in shown] == [9, 6, 3, 0]


def test_output_types():
    pipe, _ = table_pipe()
    assert pipe(num_frames=3, output_type="tokens").audios is None
    audios, tokens, rate = pipe(num_frames=3, return_dict=False)
    assert isinstance(audios, np.ndarray) and isinstance(tokens, np.ndarray) and rate == 10
    assert isinstance(pipe(num_frames=3, output_type="pt").audios, torch.Tensor)


@pytest.mark.parametrize("layout", ["parallel", "flatten"])
def test_without_an_audio_tokenizer(layout, tmp_path):
    """The same tokens, counted in frames where there are no seconds."""
    with_codec = real_pipe(2, layout)
    alone = quiet(SEDDTokenPipeline(with_codec.transformer, with_codec.scheduler))
    alone.save_pretrained(tmp_path)
    alone = quiet(tonefield.load(tmp_path))
    seconds = 2 / 8000  # of a frame
    known = with_codec(num_inference_steps=3, generator=seeds(1), num_frames=40, output_type="tokens").tokens
    for given, told in (
        (dict(num_frames=12), {}),
        (dict(loop=True), {}),
        (dict(num_frames=100), dict(overlap_in_s=20)),
        (dict(tokens=known), dict(mask=[(3.0, 9.0), (30.0, 31.0)])),
        (dict(tokens=known, loop=True), dict(audio_length_in_s=50.0)),
    ):
        scaled = {
            name: [(a * seconds, b * seconds) for a, b in value] if name == "mask" else value * seconds
            for name, value in told.items()
        }
        expected = with_codec(
            num_inference_steps=3, generator=seeds(1), output_type="tokens", **given, **scaled
        ).tokens
        result = alone(num_inference_steps=3, generator=seeds(1), **given, **told)
        assert (result.audios, result.sampling_rate) == (None, None)
        np.testing.assert_array_equal(result.tokens, expected)
    for kind in ("pt", "tokens"):
        assert torch.is_tensor(alone(num_inference_steps=1, num_frames=2, output_type=kind).tokens)
    with pytest.raises(ValueError, match="audio is given, but the pipeline has no audio_tokenizer"):
        alone(audio=np.zeros(16), audio_length_in_s=20)
    assert "tokens = pipe().tokens" in (tmp_path / "README.md").read_text()


def test_progress_is_shown(capfd):
    pipe = walk_pipe(max_length=4)
    pipe.set_progress_bar_config(disable=False)
    pipe(num_frames=10, overlap_in_s=0.1)
    assert "10/10" in capfd.readouterr().err


def test_saved_and_loaded(text_pipe, tmp_path):
    text_pipe.save_pretrained(tmp_path)
    assert 'sound = pipe(prompt="a piano")' in (tmp_path / "README.md").read_text()
    loaded = quiet(tonefield.load(tmp_path))
    assert type(loaded) is SEDDTokenPipeline and type(loaded.audio_tokenizer) is MuLawTokenizer
    assert type(loaded.text_encoder) is T5EncoderModel
    arguments = dict(prompt="loud drums", guidance_scale=2.0, num_frames=6)
    sounds = [pipe(generator=seeds(0), **arguments).audios for pipe in (text_pipe, loaded)]
    np.testing.assert_array_equal(*sounds)


# What cannot be


@pytest.mark.parametrize(("given", "message"), [
    (dict(batch_size=0), "batch_size is 0"),
    (dict(num_inference_steps=0), "num_inference_steps is 0"),
    (dict(prompt="drums"), "prompt is 'drums', but the pipeline reads no text"),
    (dict(class_labels=0), r"class_labels is \[0\], but the network has no classes"),
    (dict(guidance_scale=2.0), "there is no class and no prompt to go towards"),
    (dict(mask=[True]), "mask needs the audio"),
    (dict(output_type="wav"), "output_type is 'wav': it must be np, pt or tokens"),
    (dict(callback_on_step_end_tensor_inputs=["latents"]), "holds 'latents': it is one of tokens"),
    (dict(audio_length_in_s=0.001, num_frames=2), "give only one"),
    (dict(audio_length_in_s=-1.0), "The sound would have -8000 samples"),
    (dict(num_frames=65), r"65 frames \(0.0325 s\), but the transformer has seen at most 64 \(0.032 s\)"),
    (dict(num_frames=65, overlap_in_s=0.032), "overlap_in_s is 0.032, but windows have 0.032 s"),
    (dict(audio=torch.zeros(64)), "audio is given, but not what to do: add mask, or audio_length_in_s"),
    (dict(audio=torch.zeros(64), num_frames=20, sampling_rate=16000), "16000 samples per second, .* works at 8000"),
    (dict(audio=torch.zeros(2, 1, 64), num_frames=20), r"audio has shape \(2, 1, 64\)"),
    (dict(audio=torch.zeros(64), num_frames=15), r"has 64 samples \(0.008 s\), but the sound shall have 60"),
    (dict(audio=torch.zeros(64), mask=[(0, 1)]), r"mask holds \(0, 1\) s"),
    (dict(audio=torch.zeros(64), mask=[True] * 64), r"mask has shape \(64,\): give one boolean for each of 16 frames"),
    (dict(audio=torch.full((64,), torch.nan), num_frames=20), "not a finite number"),
    (dict(tokens=torch.zeros(1, 4, 5).long(), audio=torch.zeros(64), num_frames=20), "both given"),
    (dict(tokens=torch.zeros(1, 3, 5).long(), num_frames=20), r"integers of shape \(batch_size, 4, frames\)"),
    (dict(tokens=torch.zeros(1, 4, 5), num_frames=20), r"tokens are torch.float32"),
    (dict(tokens=torch.full((1, 4, 5), 256), num_frames=20), r"tokens hold 256 \(the mask id\): codes lie in 0..255"),
    (dict(tokens=torch.full((1, 4, 5), 300), num_frames=20), r"tokens hold 300: codes lie in 0..255"),
    (dict(tokens=torch.full((1, 4, 5), -1), num_frames=20), r"tokens hold -1: codes lie in 0..255"),
    (dict(batch_size=2, generator=seeds(0)), "generator has 1 entries for a batch of 2"),
    (dict(batch_size=3, tokens=torch.zeros(2, 4, 5).long(), num_frames=20), "tokens has 2 entries for a batch of 3"),
])  # fmt: skip
def test_bad_input(given, message, monkeypatch):
    pipe = real_pipe()
    monkeypatch.setattr(pipe.transformer, "forward", None)  # refused before any work
    with pytest.raises(ValueError, match=message) as error:
        pipe(**given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [
    dict(tokens=torch.zeros(1, 4, 5).long(), num_frames=20), dict(loop=True), dict(overlap_in_s=0.01, num_frames=99),
])  # fmt: skip
def test_nothing_stays_in_the_uniform_graph(given):
    with pytest.raises(ValueError, match="which the uniform graph does not have"):
        real_pipe(graph_type="uniform", time_conditioning=True)(**given)


def test_classes_by_name(text_pipe, tmp_path):
    names = {"zero": 0, "one": 1}
    pipe = quiet(SEDDTokenPipeline(**text_pipe.components, label2id=names))
    pipe.save_pretrained(tmp_path)
    pipe = quiet(tonefield.load(tmp_path))
    arguments = dict(num_frames=6, num_inference_steps=6, output_type="tokens")
    named = pipe(class_labels=["one", "zero", 1], generator=seeds(0, 1, 2), **arguments).tokens
    assert torch.equal(named, pipe(class_labels=[1, 0, 1], generator=seeds(0, 1, 2), **arguments).tokens)
    with pytest.raises(ValueError, match="holds 'two': labels are 0 to 1, or zero, one"):
        pipe(class_labels="two")
    with pytest.raises(ValueError, match="name each of the network's 2 classes"):
        SEDDTokenPipeline(**text_pipe.components, label2id={"zero": 0})


def test_lengths_must_be_known():
    with pytest.raises(ValueError, match="does not say how long its sounds are: give audio_length_in_s"):
        real_pipe(max_length=None)()
    assert real_pipe(max_length=None)(num_frames=70, num_inference_steps=2).audios.shape == (1, 280)


def test_labels_and_negative_prompts(text_pipe):
    with pytest.raises(ValueError, match="class_labels holds 2: labels are 0 to 1"):
        text_pipe(class_labels=2)
    with pytest.raises(ValueError, match="negative_prompt is where guidance starts from"):
        text_pipe(prompt="drums", negative_prompt="piano")


def test_components_that_do_not_fit(text_pipe):
    parts = text_pipe.components
    with pytest.raises(ValueError, match="has 4 codebooks of 256 codes, but the transformer was made for 2 of 256"):
        SEDDTokenPipeline(**parts | dict(audio_tokenizer=MuLawTokenizer(8000, 4)))
    with pytest.raises(ValueError, match="has 2 codebooks of 128 codes, but the transformer was made for 2 of 256"):
        SEDDTokenPipeline(**parts | dict(audio_tokenizer=MuLawTokenizer(8000, 2, 127)))
    with pytest.raises(ValueError, match="the graph 'absorb' on 255 symbols, but the transformer was made for"):
        SEDDTokenPipeline(**parts | dict(scheduler=ScoreEntropyScheduler(vocab_size=255)))
    with pytest.raises(ValueError, match="A tokenizer and a text_encoder need one another"):
        SEDDTokenPipeline(**parts | dict(tokenizer=None))
    wide = T5EncoderModel(T5Config(vocab_size=7, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="states are 8 wide, but the transformer was made for 12"):
        SEDDTokenPipeline(**parts | dict(text_encoder=wide))
