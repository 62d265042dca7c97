"""Autoencoders of latent-diffusion compute here what they computed there."""

import pytest
import torch
from published_autoencoders import ldm_autoencoder
from safetensors.torch import save_file

from tonefield.command_line import UserError, parse
from tonefield.conversion import convert_ldm_autoencoder
from tonefield.conversion.command import importer_parser, write
from tonefield.conversion.ldm_autoencoder import convert
from tonefield.training.latents import open_vae


SMALL = dict(multipliers=(1, 2))


def lightning(weights, dtype=torch.float32, **extra):
    """A checkpoint as Lightning writes it, with the loss and what else there is in it."""
    discriminator = {"loss.discriminator.main.0.weight": torch.zeros(4), "loss.logvar": torch.zeros(())}
    discriminator |= {"model_ema.decay": torch.ones(()), "model_ema.encoderconv_inweight": torch.zeros(2)}
    weights = {key: tensor.to(dtype) for key, tensor in weights.items()}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 4.5e-6, "params": [0]}]}
    return {
        "epoch": 3, "global_step": 100, "pytorch-lightning_version": "1.7.7", "state_dict": weights | discriminator,
        "optimizer_states": [optimizer, optimizer], "lr_schedulers": [], "callbacks": {"ModelCheckpoint": {"x": None}},
    } | extra  # fmt: skip


def made(vae, pictures, moments):
    with torch.no_grad():
        latents = moments[:, : moments.shape[1] // 2]
        dtype = vae.dtype
        return vae.encode(pictures.to(dtype)).latent_dist.parameters, vae.decode(latents.to(dtype)).sample


@pytest.mark.parametrize("shape", [
    {}, dict(blocks=2, attended=(1, 2)), dict(multipliers=(1, 2, 1, 3), latents=1, size=(16, 8)),
    dict(multipliers=(1,), channels=3, latents=4),
])  # fmt: skip
def test_the_same_latents_and_pictures(tmp_path, shape):
    weights, pictures, *expected = ldm_autoencoder(**shape)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        torch.save(lightning(weights, dtype), tmp_path / "last.ckpt")
        vae = convert_ldm_autoencoder(tmp_path / "last.ckpt")
        assert vae.dtype == dtype and vae.config.scaling_factor == 0.18215
        for ours, theirs in zip(made(vae, pictures, expected[0]), expected, strict=True):
            assert (ours - theirs).norm() / theirs.norm() < tolerance


def test_within_a_whole_model(tmp_path):
    weights, pictures, *expected = ldm_autoencoder(**SMALL)
    whole = {f"first_stage_model.{key}": tensor.half().float() for key, tensor in weights.items()}
    whole |= {"model.diffusion_model.out.0.weight": torch.zeros(3), "betas": torch.zeros(5)}
    save_file({key: tensor.contiguous() for key, tensor in whole.items()}, tmp_path / "model.safetensors")
    for ours, theirs in zip(made(convert_ldm_autoencoder(tmp_path), pictures, expected[0]), expected, strict=True):
        assert 1e-6 < (ours - theirs).norm() / theirs.norm() < 1e-2


def command(source, target, *flags):
    parser = importer_parser("")
    parser.add_argument("--scaling_factor", type=float, default=0.18215)
    args = parse(parser, [str(source), str(target), *flags])
    write(convert(args), args)


def test_command(tmp_path):
    """What it writes is what train_unet.py takes as its --vae."""
    weights, pictures, *expected = ldm_autoencoder(**SMALL)
    torch.save(lightning(weights), tmp_path / "last.ckpt")
    command(tmp_path / "last.ckpt", tmp_path / "vae", "--scaling_factor", "0.5", "--license", "mit")
    vae, mel = open_vae(str(tmp_path / "vae"))
    assert mel is None and vae.config.scaling_factor == 0.5
    for ours, theirs in zip(made(vae, pictures, expected[0]), expected, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 1e-5
    card = (tmp_path / "vae" / "README.md").read_text()
    assert "license: mit" in card and "last.ckpt" in card
    with pytest.raises(UserError, match=r"--scaling_factor is 0\.0: it must be positive"):
        command(tmp_path / "last.ckpt", tmp_path / "vae", "--scaling_factor", "0")


# Bad input


def rename(old, new):
    def change(weights):
        return {key.replace(old, new): tensor for key, tensor in weights.items()}

    return change


def resize(name, axis, count):
    def change(weights):
        return weights | {name: weights[name].narrow(axis, 0, count)}

    return change


@pytest.mark.parametrize(("change", "message"), [
    (lambda weights: {}, "no autoencoder of latent-diffusion: there is no encoder.down.0.block.0.conv2.weight"),
    (rename("post_quant_conv", "other"), "there is no post_quant_conv.weight"),
    (rename("encoder.mid.block_2.norm1", "encoder.mid.block_2.norm9"),
     "2 tensors are missing, the first is encoder.mid_block.resnets.1.norm1.weight. 2 are unknown"),
    (lambda weights: weights | {"quantize.embedding": torch.zeros(2)}, "are unknown, the first is quantize.em"),
    (resize("encoder.conv_out.weight", 0, 2), "makes no mean and variance"),
    (resize("post_quant_conv.weight", 1, 1), "has z_channels=2, but embed_dim=1"),
    (resize("encoder.conv_in.weight", 0, 16), "ch_mult begins with 2,"),
    (resize("decoder.mid.attn_1.q.weight", 0, 9), "has the shape"),
])  # fmt: skip
def test_bad_weights(tmp_path, change, message):
    weights = ldm_autoencoder(**SMALL)[0]
    torch.save({"state_dict": change(weights)}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=message.replace(".", r"\.")) as error:
        command(tmp_path / "last.ckpt", tmp_path / "vae")
    assert "\n" not in str(error.value) and not (tmp_path / "vae").exists()


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match=r"must hold one checkpoint .* not none: name the file"):
        convert_ldm_autoencoder(tmp_path)
    torch.save(lightning(ldm_autoencoder(**SMALL)[0]), tmp_path / "a.ckpt")
    data = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "b.ckpt").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"not a\.ckpt, b\.ckpt: name the file"):
        convert_ldm_autoencoder(tmp_path)
    with pytest.raises(UserError, match="is damaged or no checkpoint"):
        convert_ldm_autoencoder(tmp_path / "b.ckpt")
    torch.save([1, 2], tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="holds no autoencoder of latent-diffusion"):
        convert_ldm_autoencoder(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="There is no file or folder"):
        convert_ldm_autoencoder(tmp_path / "c.ckpt")


class Attack:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_is_executed(tmp_path, capsys):
    torch.save(lightning(ldm_autoencoder(**SMALL)[0], callbacks=Attack()), tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="which is neither a tensor nor a plain container"):
        convert_ldm_autoencoder(tmp_path / "last.ckpt")
    assert "executed" not in capsys.readouterr().out
