"""Imported score-entropy networks give the scores, losses and laws of the original, and make tokens or sound."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from exact_networks import quiet
from safetensors.torch import load_file, save_file

import tonefield
from tonefield import MuLawTokenizer, ScoreEntropyScheduler, SEDDTransformer1DModel
from tonefield.command_line import UserError
from tonefield.conversion import convert_sedd, sedd


GOLDEN = os.environ.get("TONEFIELD_GOLDEN")
needs_golden = pytest.mark.skipif(GOLDEN is None, reason="TONEFIELD_GOLDEN does not name the folder of golden data")

BLOCK = {
    "norm1.weight": "norm1.weight", "attn_qkv.weight": "qkv.weight", "attn_out.weight": "attention_out.weight",
    "norm2.weight": "norm2.weight", "mlp.0.weight": "mlp.0.weight", "mlp.0.bias": "mlp.0.bias",
    "mlp.2.weight": "mlp.2.weight", "mlp.2.bias": "mlp.2.bias", "adaLN_modulation.weight": "modulation.weight",
    "adaLN_modulation.bias": "modulation.bias",
}  # fmt: skip
OUTSIDE = {
    "vocab_embed.embedding": "token_embedding.weight", "sigma_map.mlp.0.weight": "noise_embedding.0.weight",
    "sigma_map.mlp.0.bias": "noise_embedding.0.bias", "sigma_map.mlp.2.weight": "noise_embedding.2.weight",
    "sigma_map.mlp.2.bias": "noise_embedding.2.bias", "rotary_emb.inv_freq": None,
}  # fmt: skip
LAST = {
    "output_layer.norm_final.weight": "norm_out.weight", "output_layer.linear.weight": "head.weight",
    "output_layer.linear.bias": "head.bias", "output_layer.adaLN_modulation.weight": "modulation_out.weight",
    "output_layer.adaLN_modulation.bias": "modulation_out.bias",
}  # fmt: skip
NAMES = {**OUTSIDE, **{f"blocks.{i}.{k}": f"blocks.{i}.{v}" for i in (0, 1) for k, v in BLOCK.items()}, **LAST}


def network(tokens=15, graph="absorb", seed=0, **config):
    torch.manual_seed(seed)
    model = SEDDTransformer1DModel(
        vocab_size=tokens, graph_type=graph, hidden_size=16, num_layers=2, num_heads=2, cond_dim=12,
        time_conditioning=True, max_length=8, **config,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def published(model):
    """The weights of a network as the original names and orders them."""
    state = model.state_dict()
    angles = 10000 ** (-torch.arange(0, 8, 2) / 8)
    return {there: angles if here is None else state[here].clone() for there, here in NAMES.items()}


def config_of(model, scale_by_sigma=True):
    c = model.config
    noise = "loglinear" if c.graph_type == "absorb" else "geometric"
    size = dict(
        hidden_size=c.hidden_size, cond_dim=c.cond_dim, length=8, n_blocks=c.num_layers, n_heads=c.num_heads,
        scale_by_sigma=scale_by_sigma and c.graph_type == "absorb", dropout=0.1,
    )  # fmt: skip
    noise = dict(type=noise, sigma_min=1e-4, sigma_max=20)
    return dict(tokens=c.vocab_size, graph=dict(type=c.graph_type), noise=noise, model=size, ngpus=1)


def write_run(folder, model, averaged=None, **options):
    """The folder of a training run."""
    weights = published(model)
    checkpoint = {"optimizer": {}, "model": weights, "step": 1200}
    if averaged is not None:
        shadow = [tensor for name, tensor in published(averaged).items() if name != "rotary_emb.inv_freq"]
        checkpoint["ema"] = {"decay": 0.9, "num_updates": 3, "shadow_params": shadow}
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config_of(model, **options)))
    (folder / "checkpoints-meta").mkdir()
    torch.save(checkpoint, folder / "checkpoints-meta" / "checkpoint.pth")
    return folder


def write_hub(folder, model):
    """The folder of a repository on the Hub."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(model)))
    save_file(published(model), folder / "model.safetensors")
    return folder


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def settings(part):
    return {name: value for name, value in part.config.items() if not name.startswith("_")}


@torch.no_grad()
def logits(pipe, tokens, sigma):
    return pipe.transformer(tokens, sigma).sample


# The original


@needs_golden
@pytest.mark.parametrize("name", ["sedd_hub", "sedd_local", "sedd_local_uniform"])
def test_equal_to_the_original(name):
    golden = load_file(Path(GOLDEN) / name / "io.safetensors")
    x, x0, t, sigma = (golden[key] for key in ("input_ids", "x0", "t", "sigma"))
    for weights, key in ((None, "log_score"), ("model", "log_score_raw_weights")):
        if key not in golden:
            continue
        pipe = convert_sedd(Path(GOLDEN) / name, weights=weights)
        law, n = pipe.scheduler, pipe.transformer.config.vocab_size
        output = logits(pipe, x, law.sigma(t))
        log_score = law.log_score(output, x, t)
        inside = torch.nn.functional.pad(log_score, (0, golden[key].shape[-1] - n)).scatter(-1, x[..., None], 0)
        torch.testing.assert_close(inside[..., :n], golden[key][..., :n], rtol=0, atol=2e-5)
        if weights is not None:
            assert (golden[key] - golden["log_score"]).abs().max() > 0.5
            continue
        torch.testing.assert_close(law.sigma(t), sigma, rtol=1e-5, atol=0)
        score = inside.double().exp()
        if law.absorbing:  # at a token that is no mask nothing moves, whatever its score
            entropy = law.graph.score_entropy(log_score.double() + sigma.double().expm1().log()[:, None, None], x0)
            entropy = torch.where(x == n, entropy / sigma.double().expm1()[:, None], 0)
        else:
            entropy = law.graph.score_entropy(inside.double(), sigma.double()[:, None], x, x0)
        torch.testing.assert_close(entropy, golden["score_entropy_f64"], rtol=1e-4, atol=1e-6)
        expected = golden["dsigma"] * golden["score_entropy_f64"].sum(1).float()
        torch.testing.assert_close(law.loss(output, x, x0, t), expected, rtol=1e-4, atol=0)

        step, graph = golden["step_size"].double(), law.graph
        before, after = (law.noise.sigma(time.double()) for time in (t, t - step))
        moves = graph.transposed_rate(x, torch.float64) * score
        moves = moves.scatter(-1, x[..., None], 0)
        moves = moves.scatter(-1, x[..., None], -moves.sum(-1, keepdim=True))
        here = torch.zeros_like(score).scatter(-1, x[..., None], 1)
        euler = here + step * law.noise.sigma_slope(t.double())[:, None, None] * moves
        torch.testing.assert_close(euler, golden["probs_euler"].double(), rtol=1e-4, atol=1e-6)
        for amount, expected in ((before - after, "probs_analytic"), (before, "probs_denoise")):
            amount = amount[:, None].expand(x.shape)
            law_of_step = graph.staggered_score(score, amount) * graph.transposed_transition(x, amount)
            wanted = golden[expected].double()
            torch.testing.assert_close(law_of_step[..., : wanted.shape[-1]], wanted, rtol=1e-4, atol=1e-6)


# Layouts


def test_runs_repositories_and_checkpoints(tmp_path):
    raw, averaged = network(), network(seed=1)
    run, hub = write_run(tmp_path / "run", raw, averaged), write_hub(tmp_path / "hub", raw)
    pipe = convert_sedd(run)
    assert same(pipe.transformer.state_dict(), averaged.state_dict())
    assert same(convert_sedd(run, weights="model").transformer.state_dict(), raw.state_dict())
    assert same(convert_sedd(hub).transformer.state_dict(), raw.state_dict())
    later = run / "checkpoints" / "checkpoint_7.pth"
    later.parent.mkdir()
    (run / "checkpoints-meta" / "checkpoint.pth").rename(later)
    assert same(convert_sedd(later).transformer.state_dict(), averaged.state_dict())
    moved = (run / ".hydra" / "config.yaml").rename(tmp_path / "elsewhere.yaml")
    assert same(convert_sedd(later, run_config=moved).transformer.state_dict(), averaged.state_dict())
    (hub / "model.safetensors").unlink()
    torch.save(published(raw), hub / "pytorch_model.bin")
    assert same(convert_sedd(hub).transformer.state_dict(), raw.state_dict())

    assert settings(pipe.transformer) == settings(raw)
    law = ScoreEntropyScheduler(15, parameterization="score", predictor="analytic")
    assert settings(pipe.scheduler) == settings(law)
    uniform = convert_sedd(write_hub(tmp_path / "uniform", network(graph="uniform"))).scheduler
    law = ScoreEntropyScheduler(15, "uniform", "geometric", 1e-4, 20.0, parameterization="score")
    assert settings(uniform) == settings(law)


def test_a_head_that_gives_the_score_itself(tmp_path):
    scaled = network()
    pipe = convert_sedd(write_run(tmp_path / "run", scaled, scaled, scale_by_sigma=False))
    x, t = torch.randint(16, (3, 8)), torch.tensor([1e-3, 0.5, 1.0], dtype=torch.float64)
    sigma = pipe.scheduler.sigma(t)
    with torch.no_grad():
        head = scaled(x, sigma).sample
    torch.testing.assert_close(
        pipe.scheduler.log_score(logits(pipe, x, sigma), x, t), head, rtol=1e-5, atol=1e-5
    )  # ln s without any scale
    positions = torch.tensor([[1], [0], [7]])
    some = pipe.transformer(x, sigma, positions=positions).sample
    torch.testing.assert_close(some, logits(pipe, x, sigma).gather(1, positions[..., None].expand(-1, -1, 15)))


# Use


def test_tokens_without_a_codec(tmp_path):
    model = network()
    folder, source = tmp_path / "out", write_hub(tmp_path / "hub", model)
    with pytest.raises(SystemExit) as end:
        sedd.main([str(source), str(folder)])
    assert end.value.code == 0
    pipe = quiet(tonefield.load(folder))
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2)]
    result = pipe(3, num_inference_steps=5, generator=seeds)
    assert result.audios is None and isinstance(result.tokens, np.ndarray)
    assert result.tokens.shape == (3, 1, 8) and result.tokens.min() >= 0 and result.tokens.max() < 15
    # A prefix and a suffix stay, and 20 tokens are made in windows of 8.
    known = torch.from_numpy(result.tokens[:1])
    longer = pipe(tokens=known, num_frames=20, overlap_in_s=3, num_inference_steps=5, output_type="pt").tokens
    assert longer.shape == (1, 1, 20) and torch.equal(longer[..., :8], known)
    mask = [False] * 3 + [True] * 2 + [False] * 3
    seed = torch.Generator().manual_seed(0)
    other = pipe(4, tokens=known, mask=mask, num_inference_steps=5, output_type="tokens", generator=seed).tokens
    assert torch.equal(other[..., :3], known[..., :3].expand(4, -1, -1))
    assert torch.equal(other[..., 5:], known[..., 5:].expand(4, -1, -1))
    assert (other[..., 3:5] != known[..., 3:5]).any()
    with pytest.raises(ValueError, match="audio is given, but the pipeline has no audio_tokenizer to encode it"):
        pipe(audio=np.zeros(8), mask=mask)
    card = (folder / "README.md").read_text()
    assert "| imported from | hub |" in card and "tokens = pipe().tokens" in card and "audios" not in card


def test_sound_with_a_codec(tmp_path):
    codec = MuLawTokenizer(4000, mu=15)
    codec.save_pretrained(tmp_path / "codec")
    source = write_hub(tmp_path / "hub", network(16))
    with pytest.raises(SystemExit):
        sedd.main([str(source), str(tmp_path / "out"), f"--audio_tokenizer={tmp_path / 'codec'}"])
    pipe = quiet(tonefield.load(tmp_path / "out"))
    result = pipe(2, num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    assert (result.audios.shape, result.sampling_rate) == ((2, 8), 4000)
    np.testing.assert_array_equal(result.audios, codec.decode(torch.from_numpy(result.tokens)).numpy())


def test_a_network_that_took_the_last_code_for_the_mask(tmp_path):
    """Of 16 codes it knows 15: its scores of them stay, and the last one is never made."""
    source = write_hub(tmp_path / "hub", network(15))
    MuLawTokenizer(4000, mu=15).save_pretrained(tmp_path / "codec")
    narrow, wide = convert_sedd(source), convert_sedd(source, tmp_path / "codec")
    assert wide.transformer.config.vocab_size == wide.scheduler.config.vocab_size == 16
    x, t = torch.randint(16, (4, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.4, 0.7, 1.0])
    x0 = x % 15
    sigma = wide.scheduler.sigma(t)
    shown = torch.where(x == 15, 16, x)  # the mask
    scores = [
        pipe.scheduler.log_score(logits(pipe, tokens, sigma), tokens, t)
        for pipe, tokens in ((narrow, x), (wide, shown))
    ]
    torch.testing.assert_close(scores[1][..., :15], scores[0], rtol=0, atol=1e-5)
    assert (scores[1][..., 15] < -1e6).all()
    losses = [
        pipe.scheduler.loss(logits(pipe, tokens, sigma), tokens, x0, t)
        for pipe, tokens in ((narrow, x), (wide, shown))
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    # As a known code it is to the network what it was: a gap.
    torch.testing.assert_close(logits(wide, x, sigma), logits(wide, shown, sigma), rtol=0, atol=1e-6)
    seed = torch.Generator().manual_seed(0)
    tokens = quiet(wide)(200, num_inference_steps=4, generator=seed, output_type="tokens").tokens
    assert tokens.max() == 14


# What cannot be imported


def edited(folder, change):
    """A run whose checkpoint has been changed."""
    write_run(folder, network(), network(seed=1))
    file = folder / "checkpoints-meta" / "checkpoint.pth"
    checkpoint = torch.load(file, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, file)
    return folder


def wrong_shape(checkpoint):
    checkpoint["ema"]["shadow_params"][0] = torch.zeros(15, 16)


def one_less(checkpoint):
    del checkpoint["ema"]["shadow_params"][3]


def other_names(checkpoint):
    weights = checkpoint["model"]
    weights["blocks.0.attn_kv.weight"] = weights.pop("blocks.0.attn_qkv.weight")
    weights["more"] = weights.pop("output_layer.linear.bias")


@pytest.mark.parametrize(("change", "options", "message"), [
    (wrong_shape, {}, r"vocab_embed.embedding has the shape \(15, 16\), expected \(16, 16\)"),
    (one_less, {}, "holds 29 averaged weights for 30 parameters"),
    (other_names, dict(weights="model"), "2 tensors are missing, the first is blocks.0.attn_qkv.weight. 2 are"
     " unknown, the first is blocks.0.attn_kv.weight"),
    (lambda checkpoint: checkpoint.pop("ema"), {}, "holds no averaged weights: --weights model takes the others"),
    (lambda checkpoint: None, dict(audio_tokenizer="mulaw"), "has 1 codebooks of 256 codes, but the transformer was"
     " made for 1 of 15"),
    (lambda checkpoint: None, dict(audio_tokenizer="nowhere"), "--audio_tokenizer nowhere cannot be loaded"),
    (lambda checkpoint: None, dict(run_config="nowhere.yaml"), "There is no nowhere.yaml"),
])  # fmt: skip
def test_checkpoints_that_do_not_fit(change, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        convert_sedd(edited(tmp_path / "run", change), **options)


@pytest.mark.parametrize(("change", "message"), [
    (dict(tokens=None), "does not say tokens: it is no configuration of SEDD"),
    (dict(tokens="many"), "tokens is 'many', which is no int"),
    (dict(graph=dict(type="masked")), "graph_type is 'absorb' or 'uniform', not 'masked'"),
    (dict(graph=dict(type="uniform")), "model.scale_by_sigma is for the graph absorb, not for uniform"),
    (dict(noise=dict(type="square", sigma_min=1, sigma_max=2)), "`noise_schedule` is 'square'"),
    (dict(model="small"), "does not say model.hidden_size"),
    (dict(tokens=14), r"vocab_embed.embedding has the shape \(16, 16\), expected \(15, 16\)"),
])  # fmt: skip
def test_configurations_that_do_not_fit(change, message, tmp_path):
    source = write_hub(tmp_path / "hub", network())
    config = json.loads((source / "config.json").read_text()) | change
    if config["graph"]["type"] == "masked":
        config["model"]["scale_by_sigma"] = False
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        convert_sedd(source)


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(
        UserError, match=r"holds no checkpoints-meta/checkpoint\.pth or model\.safetensors or pytorch_mod"
    ):
        convert_sedd(tmp_path)
    source = write_hub(tmp_path / "hub", network())
    with pytest.raises(UserError, match="holds one set of weights, with no --weights to choose from"):
        convert_sedd(source, weights="ema")
    (source / "config.json").write_text("{tokens: [")
    with pytest.raises(UserError, match=r"config.json is not YAML: .*"):
        convert_sedd(source)
    torch.save([torch.zeros(3)], source / "list.pth")
    (source / "config.json").write_text(json.dumps(config_of(network())))
    with pytest.raises(UserError, match="holds no weights by name"):
        convert_sedd(source / "list.pth")


def test_scores_of_all_noise_levels_are_numbers(tmp_path):
    pipe = convert_sedd(write_run(tmp_path / "run", network(), network(), scale_by_sigma=False))
    t = torch.tensor([1e-5, 1.0])
    output = logits(pipe, torch.full((2, 8), 15), pipe.scheduler.sigma(t))
    assert output.isfinite().all() and output.abs().max() < 1e3
    assert math.isfinite(pipe.scheduler.loss(output, torch.full((2, 8), 15), torch.zeros(2, 8).long(), t).sum())
