"""The average of the weights, the guard against NaN, and the sequence of the data."""

import argparse
import copy
import itertools
import json
import math
import time

import datasets
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from training_runs import RECIPE, train

from tonefield import train_unet
from tonefield.command_line import UserError
from tonefield.training import objectives
from tonefield.training.data import EndlessRows, EndlessStream, ReadPictures, Shares, TrainingData, open_data
from tonefield.training.interruption import REASONS, Interruption
from tonefield.training.loop import Average, make_accelerator
from tonefield.training.randomness import make_generators, uniform
from tonefield.training.validation import spread_labels


def test_the_average_follows_its_closed_form_and_leaves_the_weights_alone():
    model = torch.nn.Linear(3, 1).double()
    args = argparse.Namespace(ema_max_decay=0.7, ema_inv_gamma=1.0, ema_power=0.75)
    average = Average(copy.deepcopy(model), model, args)
    history, expected = [], None
    for step in range(1, 12):
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 3, generator=torch.Generator().manual_seed(step)))
        history.append(model.weight.detach().clone())
        average.step()
        torch.testing.assert_close(model.weight.detach(), history[-1], rtol=0, atol=0)
        decay = min(0.7, 1 - step**-0.75) if step > 1 else 0.0  # diffusers counts from the second step
        expected = history[-1] if expected is None else decay * expected + (1 - decay) * history[-1]
        torch.testing.assert_close(average.network.weight.detach(), expected, rtol=1e-12, atol=1e-12)
    assert not average.network.weight.requires_grad
    assert average.network.weight.data_ptr() != model.weight.data_ptr()


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_nan_stops_with_step_and_rows(mels, tmp_path, monkeypatch, logging_steps):
    """One sample of the third step is poisoned; only its micro-batch is named, and nothing is saved after it."""
    seen = itertools.count()
    loss = objectives.denoiser_loss

    def poisoned(network, clean, generators, scheduler):
        if next(seen) == 2 * 2 + 1:  # step 3, second micro-batch
            clean = clean * float("nan")
        return loss(network, clean, generators, scheduler)

    monkeypatch.setattr(objectives, "denoiser_loss", poisoned)
    order = torch.Generator()
    with pytest.raises(UserError, match="loss is nan at step 3, rows ") as error:
        train(tmp_path, mels, f"--logging_steps={logging_steps}", "--checkpointing_steps=2")
    from tonefield.training.randomness import derive_seed

    rows = torch.randperm(38, generator=order.manual_seed(derive_seed(0, "order", 0)))[20:24].tolist()
    assert f"rows {', '.join(map(str, rows))} of" in str(error.value)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def read(columns, positions):
    return {"positions": positions, "clean": torch.tensor(columns["x"])}


def test_each_epoch_has_every_row_once_in_an_order_of_its_own():
    rows = datasets.Dataset.from_dict({"x": list(range(10))})
    endless = EndlessRows(rows, read, seed=3)
    batches = itertools.islice(iter(endless.batches(Shares(4), step=0)), 10)
    order = torch.cat([batch["clean"] for batch in batches]).tolist()
    epochs = [order[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != list(range(10))
    assert EndlessRows(rows, read, seed=4).get(list(range(10)))["clean"].tolist() != epochs[0]


@pytest.mark.parametrize("stream", [False, True])
def test_processes_and_micro_batches_divide_a_step(stream):
    rows = datasets.Dataset.from_dict({"x": list(range(30))})

    def taken(shares, step, count, resume_at=None):
        source = EndlessStream(rows.to_iterable_dataset(), read, 0, 5) if stream else EndlessRows(rows, read, 0)
        found = list(itertools.islice(iter(source.batches(shares, step, resume_at=resume_at)), count))
        return [batch["clean"].tolist() for batch in found], found[-1]

    (whole, second), _ = taken(Shares(12), 0, 2)
    assert len(set(whole)) == 12
    for share in (Shares(3, 2, 2, 0), Shares(3, 2, 2, 1)):
        parts, last = taken(share, 0, 2)
        start = share.process * 3
        assert parts == [whole[start : start + 3], whole[6 + start : 9 + start]]
        # And goes on where the step ended.
        resume_at = last.get("resume_at")
        assert taken(share, 1, 1, resume_at)[0] == [second[start : start + 3]]


def test_more_charges_come_from_the_training_rows():
    rows = datasets.Dataset.from_dict({"x": list(range(30))})
    batches = iter(EndlessRows(rows, read, 0, extra=5).batches(Shares(2), 0))
    charges = torch.cat([batch["charges"] for batch in itertools.islice(batches, 6)]).tolist()
    assert sorted(charges) == list(range(30))


def test_pictures_are_flipped_and_dequantised(pictures):
    columns = datasets.load_from_disk(pictures)["train"][:]
    exact = np.stack([np.asarray(image) for image in columns["image"]]).transpose(0, 3, 1, 2)
    positions = list(range(20))
    plain = ReadPictures("image", "RGB", (8, 8))(columns, positions)["clean"]
    np.testing.assert_allclose(plain.numpy(), exact / 127.5 - 1, atol=1e-6)
    flipped = ReadPictures("image", "RGB", (8, 8), random_flip=True)(columns, positions)["clean"]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, plain, strict=True)]
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, flipped, plain, strict=True))
    assert 3 < sum(mirrored) < 17
    noisy = ReadPictures("image", "RGB", (8, 8), dequantize=True)(columns, positions)["clean"]
    back = (noisy.double() + 1) * 127.5 * 256 / 255
    np.testing.assert_array_equal(back.floor().clamp(0, 255).numpy(), exact)
    rest = (back - back.floor()).flatten()
    assert rest.mean().item() == pytest.approx(0.5, abs=0.02)
    assert rest.std().item() == pytest.approx(12**-0.5, abs=0.01)
    grey = ReadPictures("image", "L", (8, 8), "kind")(columns, positions)
    assert grey["clean"].shape == (20, 1, 8, 8)
    assert grey["class_labels"].tolist() == columns["kind"]


def test_labels_as_the_network_is_told_them():
    """The null class is the last; it stands for a missing or a withheld label; validation withholds none."""
    args = train_unet.parse_args(["--dataset_name=x", "--label_dropout=0.25"])
    data = argparse.Namespace(class_names=["a", "b"])
    told = []

    class Network(torch.nn.Module):
        def forward(self, x, timestep, class_labels):
            told.append(class_labels)
            return argparse.Namespace(sample=x)

    from tonefield.schedulers import PoissonFlowScheduler

    compute_loss = train_unet.make_loss(args, PoissonFlowScheduler(), data, None)
    labels = torch.arange(2000) % 3 - 1
    batch = {"clean": torch.zeros(2000, 1, 2, 2), "class_labels": labels}
    network = Network()
    for training in (True, False):
        compute_loss(network.train(training), batch, make_generators(0, "noise", list(range(2000))))
    training, validation = told
    assert torch.equal(validation, torch.where(labels < 0, 2, labels))
    assert (training[labels < 0] == 2).all()
    withheld = training[labels >= 0] == 2
    assert withheld.float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert torch.equal(training[labels >= 0][~withheld], labels[labels >= 0][~withheld])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_is_logged(mels, tmp_path, precision):
    """The validation loss is that of the rows one by one, whose batches are not equally large."""
    flags = ["--max_validation_samples=7", "--validation_steps=8", f"--mixed_precision={precision}"]
    train(tmp_path, mels, *flags, "--num_validation_samples=0", "--logging_steps=2")
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for row in logged[:-1]:
        assert row["samples_per_second"] * row["seconds_per_step"] == pytest.approx(8)
    rates = [row["learning_rate"] / 0.001 for row in logged[:-1]]  # 6 steps of warm-up, then half a cosine
    assert rates == pytest.approx([2 / 6, 4 / 6, 1, 0])

    args = train_unet.parse_args([f"--config={RECIPE}", f"--dataset_name={mels}", *flags])
    data = open_data(args)
    unet = UNet2DModel.from_pretrained(tmp_path, subfolder="unet").eval()
    compute_loss = train_unet.make_loss(args, train_unet.make_scheduler(args, data), data, None)
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses[dtype] = [
                compute_loss(unet, batch, make_generators(0, "validation", batch["positions"])).item()
                for batch in data.validation_batches(1)
            ]
    assert len(losses[torch.float32]) == 7
    exact, half = (np.mean(values) for values in losses.values())
    wanted, other = (exact, half) if precision == "no" else (half, exact)
    assert logged[-1]["validation_loss"] == pytest.approx(wanted, rel=3e-5)
    assert abs(wanted - other) > 1e-4 * wanted


def test_processes_divide_the_held_out_rows():
    rows = datasets.Dataset.from_dict({"x": [float(x) for x in range(11)]})
    data = TrainingData(None, rows, read, (1, 1, 1), 0.5)
    shares = [[batch["positions"] for batch in data.validation_batches(2, process, 3)] for process in range(3)]
    assert shares == [[[0, 3], [6, 9]], [[1, 4], [7, 10]], [[2, 5], [8]]]
    batches = list(data.validation_batches(4))
    assert torch.cat([batch["clean"] for batch in batches]).tolist() == list(range(11))


@pytest.mark.parametrize(("count", "classes", "labels"), [(3, 9, [0, 3, 6]), (4, 2, [0, 1, 0, 1]), (2, 11, [0, 5])])
def test_validation_samples_are_of_many_classes(count, classes, labels):
    assert spread_labels(count, classes).tolist() == labels


def test_allotted_time_is_in_hours():
    interruption = Interruption(2)
    assert interruption.deadline - time.monotonic() == pytest.approx(7200, abs=100)
    assert not interruption.due()
    interruption.deadline -= 7200
    assert REASONS[interruption.due()] == "--max_hours"
    assert Interruption(None).deadline == math.inf


def test_tf32(tmp_path):
    for flag, wanted in (("--allow_tf32", True), ("--no-allow_tf32", False)):
        make_accelerator(train_unet.parse_args(["--dataset_name=x", f"--output_dir={tmp_path}", flag]))
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == wanted


@pytest.mark.parametrize("objective", ["stable_target", "field"])
def test_a_class_is_attracted_by_its_own_charges(objective):
    """The loss of a batch of two classes is the mean of the losses of each by itself."""
    args = train_unet.parse_args(["--dataset_name=x", f"--objective={objective}", "--sigma_min=0.1", "--p_mean=0"])
    names = argparse.Namespace(class_names=["a", "b"], sigma_data=0.5, sample_shape=(1, 2, 2))
    data = argparse.Namespace(train=argparse.Namespace(extra=0), **vars(names))
    scheduler = train_unet.make_scheduler(args, data)
    channels = 1 + (objective == "field")

    class Network(torch.nn.Module):
        def forward(self, x, timestep, class_labels=None):
            return argparse.Namespace(sample=torch.zeros(len(x), channels, 2, 2))

    def loss(classes):
        data.class_names = names.class_names if classes is None else []
        rows = torch.arange(8) if classes is None else (labels == classes).nonzero()[:, 0]
        batch = {"clean": clean[rows]} | ({"class_labels": labels} if classes is None else {})
        data.validation_batches = lambda size: [batch]
        generators = make_generators(0, "noise", rows.tolist())
        if classes is not None:
            uniform(len(rows), generators)  # which labels to withhold is drawn from them first
        return train_unet.make_loss(args, scheduler, data, None)(Network().eval(), batch, generators).item()

    labels = torch.arange(8) % 2
    clean = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0)) + 2 * labels[:, None, None, None]
    assert loss(None) == pytest.approx((loss(0) + loss(1)) / 2, rel=1e-4)
