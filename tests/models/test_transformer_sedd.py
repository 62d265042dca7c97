"""The transformer against one written in numpy, against outputs of the original, and against what must not matter."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tonefield import SEDDTransformer1DModel
from tonefield.models.transformer_sedd import PRESETS, SEDDTransformerBlock, noise_features, rotary_angles, rotate


def network(seed=0, **config):
    """A small network without a zero in it."""
    arguments = dict(vocab_size=11, hidden_size=24, num_layers=2, num_heads=3, cond_dim=10, dropout=0.1)
    torch.manual_seed(seed)
    model = SEDDTransformer1DModel(**{**arguments, **config})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def draw(*shape, high=12):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(sum(shape)))


# The same in numpy, float64, from the equations


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, weight, bias=0.0):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def attend(q, k, v, heads, seen):
    """One sample, one head after the other; `seen` says which keys count."""
    q, k, v = (np.split(x, heads, axis=-1) for x in (q, k, v))
    size = q[0].shape[-1]
    return np.concatenate(
        [softmax(np.where(seen, q[i] @ k[i].T / np.sqrt(size), -np.inf)) @ v[i] for i in range(heads)], -1
    )


def turned(x, heads, places):
    """Elements k and k + half of each head as a complex number, turned by place * 10000^(-k / half)."""
    parts = []
    for part in np.split(x, heads, axis=-1):
        half = part.shape[-1] // 2
        angles = places[:, None] * 10000.0 ** (-np.arange(half) / half)
        pairs = (part[:, :half] + 1j * part[:, half:]) * np.exp(1j * angles)
        parts += [pairs.real, pairs.imag]
    return np.concatenate(parts, -1)


def numpy_forward(model, tokens, sigma=0.0, label=None, text=None, seen=None):
    """Logits for one sample of tokens (codebooks, length), time independent as of sigma = 0."""
    w = {name: value.numpy().astype(np.float64) for name, value in model.state_dict().items()}
    c, (books, length) = model.config, tokens.shape
    table = w["token_embedding.weight"].reshape(books, -1, c.hidden_size)
    x = sum(table[book][tokens[book]] for book in range(books))
    frequencies = 10000.0 ** (-np.arange(128) / 128)
    features = np.concatenate([np.cos(sigma * frequencies), np.sin(sigma * frequencies)])
    hidden = silu(w["noise_embedding.0.weight"] @ features + w["noise_embedding.0.bias"])
    condition = w["noise_embedding.2.weight"] @ hidden + w["noise_embedding.2.bias"]
    if c.num_classes is not None:
        condition = condition + w["class_embedding.weight"][c.num_classes if label is None else label]
    condition = silu(condition)
    seen = np.ones(length, bool) if seen is None else seen
    for i in range(c.num_layers):
        p = {name.removeprefix(f"blocks.{i}."): value for name, value in w.items()}
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(
            p["modulation.weight"] @ condition + p["modulation.bias"], 6
        )
        h = layer_norm(x, p["norm1.weight"]) * (1 + scale1) + shift1
        q, k, v = np.split(h @ p["qkv.weight"].T, 3, axis=-1)
        q, k = (turned(y, c.num_heads, np.arange(length)) for y in (q, k))
        x = x + gate1 * (attend(q, k, v, c.num_heads, seen) @ p["attention_out.weight"].T)
        if c.text_dim is not None:
            states = w["null_text"][0]
            if text is not None:
                states = np.concatenate([states, layer_norm(text, w["text_norm.weight"], w["text_norm.bias"])])
            k, v = np.split(states @ p["text_kv.weight"].T, 2, axis=-1)
            q = layer_norm(x, p["norm_text.weight"]) @ p["text_q.weight"].T
            x = x + attend(q, k, v, c.num_heads, np.ones(len(states), bool)) @ p["text_out.weight"].T
        h = layer_norm(x, p["norm2.weight"]) * (1 + scale2) + shift2
        h = gelu(h @ p["mlp.0.weight"].T + p["mlp.0.bias"])
        x = x + gate2 * (h @ p["mlp.2.weight"].T + p["mlp.2.bias"])
    shift, scale = np.split(w["modulation_out.weight"] @ condition + w["modulation_out.bias"], 2)
    x = layer_norm(x, w["norm_out.weight"]) * (1 + scale) + shift
    heads = zip(w["head.weight"].reshape(books, -1, c.hidden_size), w["head.bias"].reshape(books, -1), strict=True)
    return np.stack([x @ weight.T + bias for weight, bias in heads])[..., : c.vocab_size]


@pytest.mark.parametrize(("config", "symbols"), [
    (dict(time_conditioning=True), 12),
    (dict(), 12),
    (dict(time_conditioning=True, graph_type="uniform", hidden_size=36), 11),
    (dict(num_codebooks=3, num_classes=4), 12),
    (dict(text_dim=7), 12),
    (dict(num_codebooks=2, graph_type="uniform", num_classes=2, text_dim=5, time_conditioning=True), 11),
])  # fmt: skip
@torch.no_grad()
def test_equal_to_numpy(config, symbols):
    model = network(**config)
    c = model.config
    tokens, sigma = draw(3, c.num_codebooks, 9, high=symbols), torch.tensor([0.02, 1.3, 6.0])
    labels = None if c.num_classes is None else torch.tensor([0, c.num_classes, 1])
    text = None if c.text_dim is None else torch.randn(3, 4, c.text_dim)
    words = None if text is None else torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    seen = torch.ones(3, 9, dtype=torch.bool)
    seen[1, 6:] = False
    given = tokens if c.num_codebooks > 1 else tokens[:, 0]
    logits = model(given, sigma, labels, text, words, seen).sample
    assert logits.dtype == torch.float32 and logits.shape == (*given.shape, 11)
    for i in range(3):
        expected = numpy_forward(
            model, tokens[i].numpy(), sigma[i].item() if c.time_conditioning else 0.0,
            None if labels is None else labels[i].item(),
            None if text is None else text[i][words[i]].numpy(), seen[i].numpy(),
        )  # fmt: skip
        np.testing.assert_allclose(logits[i].reshape(expected.shape), expected, atol=2e-5, rtol=2e-5)


# The original


RENAMED = {
    "vocab_embed.embedding": "token_embedding.weight",
    "sigma_map.mlp": "noise_embedding",
    "attn_qkv": "qkv",
    "attn_out": "attention_out",
    "output_layer.norm_final": "norm_out",
    "output_layer.linear": "head",
    "output_layer.adaLN_modulation": "modulation_out",
    "adaLN_modulation": "modulation",
}


def renamed(weights):
    result = {}
    for name, value in weights.items():
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        result[name] = value
    return result


@pytest.mark.parametrize(("name", "config"), [
    ("sedd_hub", dict(vocab_size=64, hidden_size=64, num_layers=3, num_heads=4, cond_dim=32)),
    ("sedd_local", dict(vocab_size=50, hidden_size=32, num_heads=4, cond_dim=24)),
    ("sedd_local_uniform", dict(vocab_size=40, hidden_size=24, num_heads=3, cond_dim=20, graph_type="uniform")),
])  # fmt: skip
@torch.no_grad()
def test_equal_to_the_original(name, config):
    if "TONEFIELD_GOLDEN" not in os.environ:
        pytest.skip("TONEFIELD_GOLDEN does not name the folder of outputs of the original")
    folder = Path(os.environ["TONEFIELD_GOLDEN"]) / name
    if name == "sedd_hub":
        weights = load_file(folder / "model.safetensors")
        del weights["rotary_emb.inv_freq"]
    else:
        checkpoint = torch.load(folder / "checkpoints-meta" / "checkpoint.pth", weights_only=True)
        names = [key for key in checkpoint["model"] if key != "rotary_emb.inv_freq"]
        weights = dict(zip(names, checkpoint["ema"]["shadow_params"], strict=True))
    model = SEDDTransformer1DModel(**{"num_layers": 2, **config}, time_conditioning=True).eval()
    model.load_state_dict(renamed(weights))
    data = load_file(folder / "io.safetensors")
    tokens, sigma, expected = data["input_ids"], data["sigma"], data["log_score"]
    scores = model(tokens, sigma).sample
    if name != "sedd_local_uniform":
        scores = scores - sigma.expm1().log()[:, None, None] - np.log(config["vocab_size"])
    expected = expected[..., : config["vocab_size"]]
    other = torch.arange(config["vocab_size"]) != tokens[..., None]  # the original writes 0 at the token itself
    torch.testing.assert_close(scores[other], expected[other], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "count"), [("tiny", 32_746_241), ("small", 98_677_761), ("medium", 329_893_121)])
def test_parameter_counts_of_the_presets(name, count):
    with torch.device("meta"):
        model = SEDDTransformer1DModel.from_preset(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    # V d + noise embedding + blocks + final layer
    d, blocks = PRESETS[name]["hidden_size"], PRESETS[name]["num_layers"]
    c, v = 128, 4097
    expected = v * d + 256 * c + c + c * c + c + blocks * (12 * d * d + 7 * d + 6 * c * d + 6 * d)
    assert count == expected + d + v * d + v + 2 * c * d + 2 * d


@torch.no_grad()
def test_a_fresh_network_says_nothing():
    torch.manual_seed(0)
    config = dict(vocab_size=11, hidden_size=24, num_layers=2, num_heads=3, cond_dim=10)
    model = SEDDTransformer1DModel(**config, num_classes=3, text_dim=4, num_codebooks=2)
    logits = model(draw(2, 2, 5), torch.ones(2), torch.tensor([0, 1]), torch.randn(2, 3, 4)).sample
    assert (logits == 0).all()
    bound = 24**-0.5  # embeddings are uniform between -1 / sqrt(d) and 1 / sqrt(d)
    weight = model.token_embedding.weight
    assert 0.9 * bound < weight.abs().max() < bound and abs(weight.std() / (bound / 3**0.5) - 1) < 0.1


@torch.no_grad()
def test_text_begins_at_no_effect():
    model = network(text_dim=4)
    for block in model.blocks:
        torch.nn.init.zeros_(block.text_out.weight)
    assert all((block.text_out.weight == 0).all() for block in SEDDTransformer1DModel(**model.config).blocks)
    plain = network()
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    tokens = draw(2, 6)
    torch.testing.assert_close(model(tokens, None, None, torch.randn(2, 3, 4)).sample, plain(tokens).sample)


# Positions


def test_attention_depends_on_distances_alone():
    q, k = torch.randn(2, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_angles(torch.arange(40), 8).cos().double(), rotary_angles(torch.arange(40), 8).sin().double()
    dots = rotate(q.expand(40, 8), cos, sin) @ rotate(k.expand(40, 8), cos, sin).T
    for distance in (0, 1, 7):
        diagonal = dots.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    assert dots.diagonal(1)[0].sub(dots.diagonal(-1)[0]).abs() > 0.01


@torch.no_grad()
def test_order_of_tokens_matters_through_positions_alone(monkeypatch):
    model, tokens, order = network(), draw(1, 8), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    assert not torch.allclose(model(tokens[:, order]).sample, model(tokens).sample[:, order], atol=1e-2)
    monkeypatch.setattr("tonefield.models.transformer_sedd.rotate", lambda x, cos, sin: x)
    torch.testing.assert_close(model(tokens[:, order]).sample, model(tokens).sample[:, order], atol=1e-5, rtol=1e-5)


def test_noise_features():
    features = noise_features(torch.tensor([0.0, 2.0]))
    assert features.shape == (2, 256) and (features[0, :128] == 1).all() and (features[0, 128:] == 0).all()
    np.testing.assert_allclose(features[1, [0, 64, 128, 192]], [np.cos(2), np.cos(0.02), np.sin(2), np.sin(0.02)])


# What must matter and what must not


@torch.no_grad()
def test_noise_level():
    tokens, sigma = draw(3, 6), torch.tensor([0.1, 2.0, 5.0])
    model = network(time_conditioning=True)
    logits = model(tokens, sigma).sample
    for i in range(3):
        torch.testing.assert_close(model(tokens[i : i + 1], sigma[i]).sample[0], logits[i], atol=1e-5, rtol=1e-5)
    assert torch.equal(model(tokens, sigma[:, None]).sample, logits)
    assert not torch.allclose(model(tokens, sigma.flip(0)).sample, logits, atol=1e-2)
    model = network()
    assert torch.equal(model(tokens, sigma).sample, model(tokens).sample)


@torch.no_grad()
def test_padding_is_never_seen():
    model, tokens = network(), draw(2, 9)
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    logits = model(tokens, attention_mask=mask).sample
    alone = model(tokens[1:, :5]).sample[0]
    torch.testing.assert_close(logits[1, :5], alone, atol=1e-5, rtol=1e-5)
    tokens[1, 5:] = (tokens[1, 5:] + 1) % 12
    assert torch.equal(model(tokens, attention_mask=mask).sample[1, :5], logits[1, :5])


@torch.no_grad()
def test_no_class_and_no_text():
    model, tokens = network(num_classes=3, text_dim=4), draw(2, 6)
    nothing = model(tokens).sample
    assert torch.equal(model(tokens, class_labels=torch.tensor([3, 3])).sample, nothing)
    text, no_words = torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.bool)
    for mask in (no_words, no_words.long()):  # tokenizers return integers
        logits = model(tokens, encoder_hidden_states=text, encoder_attention_mask=mask).sample
        torch.testing.assert_close(logits, nothing, atol=1e-5, rtol=1e-5)
    for given in (dict(class_labels=torch.tensor([0, 1])), dict(encoder_hidden_states=text)):
        assert not torch.allclose(model(tokens, **given).sample, nothing, atol=1e-2)


# Codebooks in one sequence


def in_sequence(layout, books=3):
    return network(vocab_size=4 * books, num_codebooks=books, layout=layout)


@torch.no_grad()
def test_the_order_of_codebooks_in_the_sequence_is_only_an_order():
    frames, books = 5, 3
    codes = draw(2, books, frames, high=4) + 4 * torch.arange(books)[:, None]
    codes[:, 1, 2] = 12  # masked
    flatten, major = in_sequence("flatten"), in_sequence("codebook_major")
    flat_logits = flatten(codes.transpose(1, 2).flatten(1)).sample.unflatten(1, (frames, books)).transpose(1, 2)
    major_logits = major(codes.flatten(1)).sample.unflatten(1, (books, frames))
    torch.testing.assert_close(flat_logits, major_logits, atol=1e-5, rtol=1e-5)
    probability = flat_logits.softmax(-1).unflatten(-1, (books, 4)).sum(-1)
    for book in range(books):  # all of the probability lies on the symbols of the codebook
        torch.testing.assert_close(probability[:, book, :, book], torch.ones(2, frames))
        assert (probability[:, book].sum(-1) - probability[:, book, :, book]).abs().max() < 1e-6


# The head only where it is wanted


@pytest.mark.parametrize("config", [
    dict(), dict(graph_type="uniform"), dict(num_codebooks=3), dict(num_codebooks=3, layout="flatten", vocab_size=12),
])  # fmt: skip
@pytest.mark.parametrize("count", [2, 8])
@torch.no_grad()
def test_positions(config, count):
    model = network(**config)
    tokens = draw(2, 3, 6, high=11) if model.tables > 1 else draw(2, 6, high=11)
    logits = model(tokens).sample
    positions = draw(2, count, high=tokens[0].numel())
    wanted = model(tokens, positions=positions).sample
    expected = logits.reshape(2, -1, logits.shape[-1])[torch.arange(2)[:, None], positions]
    torch.testing.assert_close(wanted, expected, atol=1e-5, rtol=1e-5)


def test_positions_cost_no_full_head():
    """Multiplications of the head are counted where they are made."""
    counts = []
    model = network(num_codebooks=2)
    linear = torch.nn.functional.linear

    def counting(x, weight, bias=None):
        counts.append(x.shape[:-1].numel() if weight.shape[0] == 22 else 0)
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.linear", counting)
        model(draw(2, 2, 30), positions=draw(2, 4, high=60))
    assert sum(counts) == 2 * 4


# Precision, memory, speed


@torch.no_grad()
def test_bfloat16_keeps_a_float32_head():
    model, tokens = network(num_classes=2, text_dim=4, time_conditioning=True), draw(2, 12)
    text, labels, sigma = torch.randn(2, 3, 4), torch.tensor([0, 2]), torch.tensor([0.1, 3.0])
    exact = model(tokens, sigma, labels, text).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(tokens, sigma, labels, text).sample
    half = model.to(torch.bfloat16)(tokens, sigma, labels, text.bfloat16()).sample
    for logits in (mixed, half):
        assert logits.dtype == torch.float32
        assert 0 < (logits - exact).norm() / exact.norm() < 0.05
        # A head of bfloat16 would leave nothing but multiples of 2^-8 of each value.
        assert (logits != logits.bfloat16()).float().mean() > 0.9


def test_gradient_checkpointing_changes_no_gradient(monkeypatch):
    gradients, calls = [], []
    forward = SEDDTransformerBlock.forward

    def counted(*arguments):
        calls.append(1)
        return forward(*arguments)

    monkeypatch.setattr(SEDDTransformerBlock, "forward", counted)
    for checkpointing in (False, True):
        model = network(num_classes=2, text_dim=4).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(1)
        model(draw(2, 6), None, torch.tensor([0, 1]), torch.ones(2, 3, 4)).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    # What stands in the null condition's row of a table or in the mask's row of the head has none.
    assert len(gradients[0]) == len(list(model.parameters()))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert len(calls) == 2 + 2 * 2  # two blocks, with checkpointing once more for the gradient


def test_dropout_only_in_training():
    model, tokens = network(), draw(1, 6)
    assert torch.equal(model(tokens).sample, model(tokens).sample)
    model.train()
    assert not torch.equal(model(tokens).sample, model(tokens).sample)
    # Dropping everything leaves nothing of what the blocks add.
    model = network(text_dim=4, dropout=1.0).train()
    dropped = model(tokens, encoder_hidden_states=torch.ones(1, 2, 4)).sample
    model.blocks = torch.nn.ModuleList()
    torch.testing.assert_close(dropped, model(tokens).sample)


CONFIGS_TO_COMPILE = [
    dict(num_classes=2, text_dim=4, time_conditioning=True), dict(num_codebooks=2),
    dict(num_codebooks=2, layout="flatten", vocab_size=12),
]  # fmt: skip


@pytest.mark.parametrize(("config", "backend"), [
    *((config, "eager") for config in CONFIGS_TO_COMPILE),
    pytest.param(CONFIGS_TO_COMPILE[0], "inductor", marks=pytest.mark.slow),
])  # fmt: skip
def test_compiled_in_one_graph(config, backend):
    model = network(**config)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    tokens = draw(2, 2, 6) if model.tables > 1 else draw(2, 6)
    given = {}
    if model.config.num_classes:
        given = dict(class_labels=torch.tensor([0, 2]), encoder_hidden_states=torch.ones(2, 3, 4))
    for positions in (None, draw(2, 3, high=6)):
        arguments = dict(timestep=torch.tensor([0.1, 2.0]), positions=positions, **given)
        torch.testing.assert_close(
            compiled(tokens, **arguments).sample, model(tokens, **arguments).sample, atol=1e-4, rtol=1e-4
        )


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    model, tokens = network(num_classes=2, text_dim=4, num_codebooks=2, max_length=77), draw(2, 2, 6)
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".json"] == [
        "diffusion_pytorch_model.safetensors"
    ]
    loaded = SEDDTransformer1DModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(loaded(tokens).sample, model(tokens).sample)
    assert loaded.config.max_length == 77


@pytest.mark.parametrize(("config", "message"), [
    (dict(graph_type="masked"), "graph_type is 'absorb' or 'uniform', not 'masked'"),
    (dict(layout="delay"), "layout is 'parallel', 'flatten' or 'codebook_major', not 'delay'"),
    (dict(num_heads=5), "hidden_size 24 must be a multiple of 2 \\* num_heads = 10"),
    (dict(scaled_by_sigma=False), "scaled_by_sigma=False is for the absorbing graph and time_conditioning=True"),
    (dict(layout="flatten", num_codebooks=2), "vocab_size 11 must be a multiple of num_codebooks = 2"),
    (dict(layout="flatten", num_codebooks=2, vocab_size=8, graph_type="uniform"), "which layout 'flatten' forbids"),
])  # fmt: skip
def test_configurations_that_cannot_be(config, message):
    with pytest.raises(ValueError, match=message):
        network(**config)


@pytest.mark.parametrize(("config", "given", "message"), [
    (dict(time_conditioning=True), {}, "timestep is missing"),
    ({}, dict(class_labels=torch.tensor([0])), "this network has no classes"),
    ({}, dict(encoder_hidden_states=torch.ones(1, 2, 4)), "this network reads no text"),
])  # fmt: skip
def test_inputs_that_the_network_has_no_place_for(config, given, message):
    with pytest.raises(ValueError, match=message):
        network(**config)(draw(1, 4), **given)


def test_unknown_preset():
    with pytest.raises(ValueError, match="no transformer preset 'huge'; the presets are tiny, small, medium"):
        SEDDTransformer1DModel.from_preset("huge")
