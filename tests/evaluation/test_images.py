"""Scores of pictures: Inception against a forward written layer by layer, resizing, encoders, the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from scipy.special import log_softmax
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import tonefield.evaluate as script
from tonefield.command_line import UserError
from tonefield.evaluation.image_sets import ImageSet, load_encoder, read_picture
from tonefield.evaluation.inception import InceptionV3, load_inception, resize_like_tensorflow_1


@pytest.fixture(scope="module")
def weights():
    """Random weights in the published layout, at which activations neither vanish nor explode."""
    torch.manual_seed(0)
    state = InceptionV3().state_dict()
    for key, value in state.items():
        if key.endswith("conv.weight"):
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
        elif key.endswith(("bn.weight", "bn.running_var")):
            value.uniform_(0.7, 1.4)
        elif key.endswith(("bn.bias", "bn.running_mean", "fc.bias")):
            value.normal_(0, 0.1)
    return state


@pytest.fixture(scope="module")
def published(weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save({key: value for key, value in weights.items() if "num_batches" not in key}, file)
    return file


def plain_inception(w, x):
    """The network, from the published figures: nothing of it is shared with the one that is tested."""

    def conv(x, key, stride=1, pad=0):
        x = F.conv2d(x, w[f"{key}.conv.weight"], None, stride, pad)
        mean, var = w[f"{key}.bn.running_mean"], w[f"{key}.bn.running_var"]
        scale = w[f"{key}.bn.weight"] / torch.sqrt(var + 0.001)
        return ((x - mean[:, None, None]) * scale[:, None, None] + w[f"{key}.bn.bias"][:, None, None]).clamp(min=0)

    def average(x):  # of the pixels that are there
        ones = torch.ones_like(x[:1, :1])
        kernel = torch.ones(1, 1, 3, 3, dtype=x.dtype)
        sums = F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1).view(x.shape)
        return sums / F.conv2d(ones, kernel, padding=1)

    def a(x, k):
        one = conv(x, f"{k}.branch1x1")
        five = conv(conv(x, f"{k}.branch5x5_1"), f"{k}.branch5x5_2", pad=2)
        three = conv(conv(x, f"{k}.branch3x3dbl_1"), f"{k}.branch3x3dbl_2", pad=1)
        three = conv(three, f"{k}.branch3x3dbl_3", pad=1)
        return torch.cat([one, five, three, conv(average(x), f"{k}.branch_pool")], 1)

    def b(x, k):
        three = conv(x, f"{k}.branch3x3", 2)
        double = conv(conv(x, f"{k}.branch3x3dbl_1"), f"{k}.branch3x3dbl_2", pad=1)
        return torch.cat([three, conv(double, f"{k}.branch3x3dbl_3", 2), F.max_pool2d(x, 3, 2)], 1)

    def c(x, k):
        y = conv(x, f"{k}.branch7x7_1")
        y = conv(conv(y, f"{k}.branch7x7_2", pad=(0, 3)), f"{k}.branch7x7_3", pad=(3, 0))
        z = conv(x, f"{k}.branch7x7dbl_1")
        for number, pad in ((2, (3, 0)), (3, (0, 3)), (4, (3, 0)), (5, (0, 3))):
            z = conv(z, f"{k}.branch7x7dbl_{number}", pad=pad)
        return torch.cat([conv(x, f"{k}.branch1x1"), y, z, conv(average(x), f"{k}.branch_pool")], 1)

    def d(x, k):
        y = conv(conv(x, f"{k}.branch3x3_1"), f"{k}.branch3x3_2", 2)
        z = conv(x, f"{k}.branch7x7x3_1")
        z = conv(conv(z, f"{k}.branch7x7x3_2", pad=(0, 3)), f"{k}.branch7x7x3_3", pad=(3, 0))
        return torch.cat([y, conv(z, f"{k}.branch7x7x3_4", 2), F.max_pool2d(x, 3, 2)], 1)

    def e(x, k, pooled):
        y = conv(x, f"{k}.branch3x3_1")
        z = conv(conv(x, f"{k}.branch3x3dbl_1"), f"{k}.branch3x3dbl_2", pad=1)
        parts = [conv(x, f"{k}.branch1x1"), conv(y, f"{k}.branch3x3_2a", pad=(0, 1))]
        parts += [conv(y, f"{k}.branch3x3_2b", pad=(1, 0)), conv(z, f"{k}.branch3x3dbl_3a", pad=(0, 1))]
        return torch.cat([*parts, conv(z, f"{k}.branch3x3dbl_3b", pad=(1, 0)), conv(pooled, f"{k}.branch_pool")], 1)

    x = conv(conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3", pad=1)
    x = conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, 2)
    for key in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = a(x, key)
    x = b(x, "Mixed_6a")
    for key in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = c(x, key)
    x = d(x, "Mixed_7a")
    x = e(x, "Mixed_7b", average(x))
    return e(x, "Mixed_7c", F.max_pool2d(x, 3, 1, 1)).mean((2, 3))


def test_the_network_is_the_published_one(published, weights):
    model = load_inception(published)
    assert sum(p.numel() for p in model.parameters()) == 23_834_568 + 8 * 2049  # torchvision's, and 8 classes more
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_6b.branch7x7dbl_5.conv.weight": (192, 128, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1), "fc.weight": (1008, 2048),
    }  # fmt: skip
    assert {key: tuple(model.state_dict()[key].shape) for key in shapes} == shapes
    pictures = torch.rand(2, 3, 107, 123, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        ours = model(pictures)
        theirs = plain_inception({k: v.double() for k, v in weights.items()}, pictures.double())
    assert ours.shape == (2, 2048) and theirs.std() > 0.05
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_wrong_files_are_refused(published, weights, tmp_path):
    def refused(state, message):
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(UserError, match=message) as error:
            load_inception(tmp_path / "x.pth")
        assert "\n" not in str(error.value)

    refused(
        {k: v for k, v in weights.items() if not k.startswith("Mixed_7c")}, "tensors are missing, the first is Mix"
    )
    refused(weights | {"AuxLogits.fc.weight": torch.zeros(2)}, "1 were not expected, the first is AuxLogits")
    refused(weights | {"fc.weight": torch.zeros(1000, 2048)}, r"fc.weight has the shape \(1000, 2048\)")
    refused([1, 2], "does not hold the weights of a network but a list")
    (tmp_path / "cut.pth").write_bytes(published.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        load_inception(tmp_path / "cut.pth")
    with pytest.raises(UserError, match="There is no file"):
        load_encoder(f"inception={tmp_path / 'nothing.pth'}")
    with pytest.raises(UserError, match="needs its weights"):
        load_encoder("inception")


@pytest.mark.parametrize(("height", "width", "size"), [(5, 8, 13), (32, 32, 299), (400, 310, 299), (7, 7, 7)])
def test_resizing_reads_at_the_places_of_tensorflow_1(height, width, size):
    pixels = torch.rand(2, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, columns = (np.arange(size) * old / size for old in (height, width))
    expected = np.empty((size, size))
    for i, y in enumerate(rows[:20]):
        for j, x in enumerate(columns):
            low_y, low_x = int(y), int(x)
            high_y, high_x = min(low_y + 1, height - 1), min(low_x + 1, width - 1)
            p = pixels[1, 2].numpy()
            top = p[low_y, low_x] * (1 - x + low_x) + p[low_y, high_x] * (x - low_x)
            bottom = p[high_y, low_x] * (1 - x + low_x) + p[high_y, high_x] * (x - low_x)
            expected[i, j] = top * (1 - y + low_y) + bottom * (y - low_y)
    resized = resize_like_tensorflow_1(pixels, size)
    assert resized.shape == (2, 3, size, size)
    assert np.allclose(resized[1, 2, :20], expected[:20], atol=1e-12)


def test_a_ramp_keeps_its_first_pixel_and_ends_flat():
    ramp = torch.arange(4.0).expand(1, 1, 1, 4)
    assert resize_like_tensorflow_1(ramp, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]


# Encoders


def make_pictures(folder, count, seed, shift=0.0, size=(20, 24)):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        colour = rng.uniform(40, 160, 3) + shift
        picture = colour + 30 * rng.normal(size=(*size, 3)) + np.linspace(0, 50, size[1])[:, None] * rng.uniform(-1, 1)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name, seed, shift in (("real", 0, 0), ("held_out", 1, 0), ("bright", 2, 60)):
        make_pictures(root / name, 30, seed, shift)
    return root


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    vit = ViTForImageClassification(ViTConfig(**small, image_size=16, patch_size=8, num_labels=5))
    resnet = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    )
    dino = Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    )
    text = dict(vocab_size=20, max_position_embeddings=8)
    clip = CLIPModel(
        CLIPConfig(vision_config=small | dict(image_size=16, patch_size=8), text_config=small | text, projection_dim=6)
    )
    for name, model in (("vit", vit), ("resnet", resnet), ("dino", dino), ("clip", clip)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.eval().save_pretrained(root / name)
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(root / name)
    return root, vit, resnet, dino, clip


def test_encoders_of_transformers(encoders, folders):
    root, vit, resnet, dino, clip = encoders
    paths = sorted((folders / "real").iterdir())[:3]
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    pixels = processor([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    pictures = [read_picture(path) for path in paths]
    with torch.no_grad():
        expected = {
            "vit": vit.vit(pixels).last_hidden_state[:, 0],
            "resnet": resnet.resnet(pixels).pooler_output.flatten(1),
            "dino": dino(pixels).pooler_output,
            "clip": clip.get_image_features(pixels).pooler_output,
        }
        logits = {"vit": vit(pixels).logits, "resnet": resnet(pixels).logits}
    for name, rows in expected.items():
        encoder = load_encoder(str(root / name))
        found = np.concatenate(encoder.embed(pictures, batch_size=2))
        assert encoder.dim == rows.shape[1] and np.allclose(found, rows, atol=1e-5)
        if name in logits:
            theirs = log_softmax(logits[name].double().numpy(), axis=1)
            assert np.allclose(encoder.log_posteriors(found), theirs, atol=1e-5)
        else:
            with pytest.raises(ValueError, match="knows no classes"):
                encoder.log_posteriors(found)


def test_pictures_that_cannot_be_read_are_listed(tmp_path):
    make_pictures(tmp_path / "deep" / "er", 2, 0)
    Image.new("L", (9, 7), 100).save(tmp_path / "grey.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("not looked at")
    found = ImageSet.open(tmp_path)
    assert [sample.name for sample in found.samples] == ["deep/er/000.png", "deep/er/001.png", "grey.png"]
    assert found.rejects[0][0] == "broken.jpg" and "cannot be read as a picture" in found.rejects[0][1]
    (grey,) = found.load(found.samples[2:], None)
    assert grey.shape == (7, 9, 3) and (grey == 100).all()
    with pytest.raises(UserError, match=r"--x .*nowhere does not exist"):
        ImageSet.open(tmp_path / "nowhere", flag="--x")
    with pytest.raises(UserError, match="There are no pictures in"):
        (tmp_path / "empty").mkdir()
        ImageSet.open(tmp_path / "empty")


# The command


def run(capsys, *flags):
    script.main(script.parse_args(["images", *map(str, flags), "--device=cpu"]))
    return capsys.readouterr()


def test_the_command(encoders, folders, tmp_path, capsys):
    root = encoders[0]
    out = tmp_path / "reports" / "report.json"
    printed = run(
        capsys, "--reference", folders / "real", folders / "held_out", "--generated", folders / "bright",
        "--metrics", "fid", "kid", "is", "precision_recall", "--encoder", root / "vit", "--out", out,
    )  # fmt: skip
    report = json.loads(out.read_text())
    results = {(one["metric"], one["reference"]): one for one in report["results"]}
    assert len(results) == 2 + 2 + 1 + 4
    rows = {}
    encoder = load_encoder(str(root / "vit"))
    for name in ("real", "bright"):
        pictures = [read_picture(path) for path in sorted((folders / name).iterdir())]
        rows[name] = np.concatenate(encoder.embed(pictures)).astype(np.float64)
    covariances = [np.cov(of.T) for of in rows.values()]
    product = linalg.sqrtm(covariances[0] @ covariances[1]).real
    shift = rows["real"].mean(0) - rows["bright"].mean(0)
    fid = shift @ shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(product)
    assert results["fid", str(folders / "real")]["value"] == pytest.approx(fid, rel=1e-6)

    def kernel(x, y):
        return (x @ y.T / 16 + 1) ** 3

    real, bright, n = rows["real"], rows["bright"], 30
    same = sum((kernel(x, x).sum() - np.trace(kernel(x, x))) / (n * (n - 1)) for x in (real, bright))
    kid = same - 2 * kernel(real, bright).mean()
    assert results["kid", str(folders / "real")]["value"] == pytest.approx(kid, rel=1e-8)

    p = np.exp(encoder.log_posteriors(rows["bright"]))
    score = results["is", None]
    assert score["value"] == pytest.approx(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    parts = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in np.array_split(p, 10)]
    assert score["splits_mean"] == pytest.approx(np.mean(parts)) and score["splits_std"] == pytest.approx(
        np.std(parts)
    )
    assert score["interval"][0] < score["value"] < score["interval"][1]
    assert results["precision", str(folders / "real")]["value"] < results["precision", str(folders / "real")]["k"]
    assert report["encoder"]["dim"] == 16 and report["generated"]["files"] == 30
    assert "fid" in printed.out and "30 pictures" in printed.out and "the report is in" in printed.out
    assert "which span only a part" not in printed.err and "fewer than ten for each" in printed.err


def test_identical_folders_and_ordering(encoders, folders, capsys, tmp_path):
    def fid(other, *flags):
        run(capsys, "--reference", folders / "real", "--generated", other, "--metrics", "fid", "--bootstrap=0",
            "--encoder", encoders[0] / "dino", "--out", tmp_path / "r.json", *flags)  # fmt: skip
        return json.loads((tmp_path / "r.json").read_text())["results"][0]["value"]

    assert abs(fid(folders / "real")) < 1e-6
    assert fid(folders / "held_out") < fid(folders / "bright")
    assert fid(folders / "bright", "--cache_dir", tmp_path / "cache") == fid(
        folders / "bright", "--cache_dir", tmp_path / "cache", "--batch_size=7"
    )
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_standard_weights(published, folders, capsys, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted((folders / "real").iterdir())[:2]:
        (few / path.name).write_bytes(path.read_bytes())
    flags = ["--metrics", "is", "--encoder", f"inception={published}", "--bootstrap=0", "--out", tmp_path / "r.json"]
    printed = run(capsys, "--generated", few, *flags)
    assert "resized to 299 x 299 as TensorFlow 1 does" in printed.out
    report = json.loads((tmp_path / "r.json").read_text())
    model = load_inception(published)
    pixels = [
        torch.from_numpy(read_picture(path).copy()).permute(2, 0, 1)[None].float() for path in sorted(few.iterdir())
    ]
    with torch.no_grad():
        rows = model(torch.cat([resize_like_tensorflow_1(one, 299) / 128 - 1 for one in pixels])).double()
        p = (rows @ model.fc.weight.double().T).softmax(1)
    expected = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    assert report["results"][0]["value"] == pytest.approx(expected, rel=1e-6)
    assert report["results"][0]["classes"] == 1008


def test_errors_are_one_line(encoders, folders, tmp_path, capsys):
    def refused(*flags, message):
        with pytest.raises(UserError, match=message) as error:
            run(capsys, *flags)
        assert "\n" not in str(error.value)

    given = ("--generated", folders / "real", "--reference", folders / "held_out")
    vit, dino = (f"--encoder={encoders[0] / name}" for name in ("vit", "dino"))
    refused(*given, vit, "--metrics", "fad", message="There is no metric 'fad' of pictures; there are fid, kid, is")
    refused(*given[:2], vit, message="fid compares with pictures: name them with --reference")
    refused(*given, dino, "--metrics", "is", message="is: encoder=.* knows no classes")
    refused(*given, f"--encoder={tmp_path}", message="neither inception=FILE nor an image model")
    refused(*given, vit, "--batch_size=0", message="--batch_size is at least 1, not 0")
    refused(*given, vit, "--out", tmp_path, message="is a folder: name a file")
