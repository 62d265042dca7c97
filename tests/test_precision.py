"""
Half precision and compiled networks. A bfloat16 has a relative rounding error of at most u = 2^-8. Errors of n
roundings in a row that know nothing of each other add up to about u sqrt(n); here there are fewer than 100 in a row.
"""

import copy

import pytest
import torch
from exact_networks import quiet
from small_pipes import SMALL, shaken, small_mel
from test_devices import BLOCKS, generate, made, mel_pipe, network, text_pipe, token_pipe

from tonefield import MelPFGMPipeline, PoissonFlowScheduler
from tonefield.models import FSQCodec, PFGMUNet2DModel, SEDDTransformer1DModel, SongUNet2DModel, WavTokenizer


ROUNDING = 2**-8
BOUND = 10 * ROUNDING  # sqrt(100)


def transformer():
    torch.manual_seed(0)
    return shaken(SEDDTransformer1DModel(16, hidden_size=32, num_layers=2, num_heads=2, cond_dim=16, num_classes=2))


INPUTS = {
    "UNet2DModel": lambda: (network(), (torch.randn(2, 1, 16, 16), torch.tensor([0.3, -0.2]))),
    "SEDDTransformer1DModel": lambda: (transformer(), (torch.randint(17, (2, 8)), torch.tensor([0.3, 2.0]))),
}


def relative(ours, theirs):
    return ((ours.float() - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("cast", [False, True])
def test_bfloat16_is_near_float32_and_not_the_same(name, cast):
    model, inputs = INPUTS[name]()
    expected = model(*inputs).sample
    if cast:
        half = copy.deepcopy(model).to(torch.bfloat16)
        given = [x.bfloat16() if x.ndim == 4 else x for x in inputs]
        output = half(*given).sample
    else:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(*inputs).sample
    assert 0 < relative(output, expected) < BOUND


@pytest.mark.parametrize("name", INPUTS)
def test_gradients_under_autocast(name):
    model, inputs = INPUTS[name]()
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(*inputs).sample.float().square().mean()
        loss.backward()
        present = [value.grad.flatten() for value in model.parameters() if value.grad is not None]
        assert all(value.dtype == torch.float32 for value in present)
        gradients.append(torch.cat(present))
    assert 0 < relative(gradients[1], gradients[0]) < 2 * BOUND  # there and back


def test_pipelines_in_bfloat16_keep_float32_between_the_steps():
    pipe, call = mel_pipe(PoissonFlowScheduler(solver_type="euler")), dict(class_labels=[0, 1])
    expected = made(generate(pipe, call))
    seen = []
    pipe.to(torch.bfloat16)
    hook = pipe.unet.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    half = pipe(
        **call, num_inference_steps=4, output_type="mel",
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        callback_on_step_end=lambda _pipe, _step, _time, values: seen.append(values["latents"].dtype) or values,
    ).mels  # fmt: skip
    hook.remove()
    assert seen == [torch.bfloat16, torch.float32] * 4
    assert 0 < relative(half, expected) < 4 * BOUND  # four calls


@pytest.mark.parametrize("make", [lambda: text_pipe(PoissonFlowScheduler()), token_pipe], ids=["text", "tokens"])
def test_other_pipelines_in_bfloat16(make):
    pipe = make().to(torch.bfloat16)
    call = dict(prompt="rain") if "unet" in pipe.components else dict(class_labels=1, num_frames=8)
    sound = generate(pipe, call).audios
    assert sound.dtype == torch.float32 and sound.isfinite().all() and sound.std() > 0


@pytest.mark.parametrize("make", [mel_pipe, text_pipe], ids=["mel", "text"])
def test_no_step_walks_through_a_network(make, monkeypatch):
    """As a look at its `dtype` does, which costs as much as a few of its layers. (UNet2DModel does it itself.)"""
    pipe, walked, inside = make(PoissonFlowScheduler()), [], []
    pipe.unet.register_forward_pre_hook(lambda *_: inside.append(True))
    pipe.unet.register_forward_hook(lambda *_: inside.clear())
    named_modules = torch.nn.Module.named_modules

    def watched(module, *args, **kwargs):
        walked[-1] += module is pipe.unet and not inside
        return named_modules(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "named_modules", watched)
    for steps in (2, 6):
        walked.append(0)
        pipe(**dict(prompt="rain") if make is text_pipe else {}, num_inference_steps=steps, output_type="mel")
    assert walked[0] == walked[1] > 0


SONG = dict(sample_size=16, in_channels=1, out_channels=1, model_channels=16, block_out_channels=[16, 16],
            layers_per_block=1, attention_levels=[1])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [*INPUTS, "SongUNet2DModel", "FSQCodec"])
def test_compiled_networks_equal_eager_ones(name):
    torch.manual_seed(0)
    if name in INPUTS:
        model, inputs = INPUTS[name]()
    elif name == "SongUNet2DModel":
        model, inputs = shaken(SongUNet2DModel(**SONG)), (torch.randn(2, 1, 16, 16), torch.tensor([0.3, -0.2]))
    else:
        model, inputs = FSQCodec.from_preset("digits-8k").eval(), (torch.randn(1, 1600),)

    def output(network):
        with torch.no_grad():
            result = network(*inputs)
        result = result.sample if hasattr(result, "sample") else result
        return result[0] if isinstance(result, tuple) else result

    torch.testing.assert_close(output(torch.compile(model)), output(model), rtol=1e-4, atol=1e-4)


def pfgm_pipe():
    torch.manual_seed(0)
    unet = shaken(PFGMUNet2DModel(**SMALL | {"out_channels": 2}, **BLOCKS))
    return quiet(MelPFGMPipeline(unet, PoissonFlowScheduler(prediction_type="field", aug_dim=1), small_mel()))


PIPES = {
    "classes": (lambda: mel_pipe(PoissonFlowScheduler()), dict(class_labels=[0, 1], guidance_scale=2.0)),
    "PFGM": (pfgm_pipe, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPES)
def test_a_pipeline_with_a_compiled_network(name):
    make, call = PIPES[name]
    pipe = make()
    expected = made(generate(pipe, call))
    pipe.unet = torch.compile(pipe.unet)
    torch.testing.assert_close(made(generate(pipe, call)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_decoder_of_tokens(monkeypatch):
    """Without a break of the graph, from the codes to the waveform."""
    torch.manual_seed(0)
    codec = shaken(WavTokenizer(
        sampling_rate=400, strides=(2, 4, 5), encoder_width=4, latent_dim=12, codebook_size=50, width=64,
        inner_width=48, num_layers=2, n_fft=160,
    ))  # fmt: skip
    codes = torch.randint(50, (2, 1, 30))
    expected = codec.decode(codes)
    monkeypatch.setattr(codec, "_decode", torch.compile(codec._decode, fullgraph=True))
    assert expected.std() > 0
    torch.testing.assert_close(codec.decode(codes), expected, rtol=1e-4, atol=1e-4)
