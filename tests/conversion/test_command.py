"""What all importers do alike, on the smallest of models: nothing is run, nothing is lost, and errors are one line."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import TOKEN, FakeHub
from safetensors.torch import save_file

from tonefield import MuLawTokenizer, SEDDTransformer1DModel
from tonefield.command_line import UserError
from tonefield.conversion.command import (
    find_source,
    importer_parser,
    load_strictly,
    read_checkpoint,
    run_importer,
    write,
)
from tonefield.pipelines.tonefield_repository import CARD_MARK


ROOT = Path(__file__).resolve().parents[2]


class Runs:
    """A pickle of it creates a file when it is read without care."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def arguments(source, target, *flags):
    return importer_parser("").parse_args([str(source), str(target), *flags])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Reading


def test_nothing_of_a_checkpoint_is_run(tmp_path):
    for number, legacy in enumerate((False, True)):
        file, created = tmp_path / f"{number}.pth", tmp_path / f"created{number}"
        weights = {"model": {"w": torch.ones(3)}, "more": Runs(created)}
        torch.save(weights, file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UserError, match=r"0\.pth|1\.pth") as error:
            read_checkpoint(file)
        assert "wants to use posix.mkdir" in str(error.value) or "wants to use nt.mkdir" in str(error.value)
        assert "\n" not in str(error.value)
        assert not created.exists()
        torch.load(file, weights_only=False)  # it would have
        assert created.exists()


def damaged(tmp_path):
    weights = {"w": torch.randn(100), "v": torch.ones(7)}
    save_file(weights, tmp_path / "whole.safetensors")
    torch.save(weights, tmp_path / "whole.pth")
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for whole in ("whole.safetensors", "whole.pth", "old.pt"):
        data = (tmp_path / whole).read_bytes()
        assert read_checkpoint(tmp_path / whole)["w"].shape == (100,)
        for share in (0.0, 0.02, 0.3, 0.7, 0.99):
            yield whole, data[: int(share * len(data))]
    torch.save({"w": torch.randn(10_000)}, tmp_path / "long.pth")
    yield "long.pth", (tmp_path / "long.pth").read_bytes()[:5000]  # for which torch raises an OSError
    for name, data in {
        "page.safetensors": b"<!DOCTYPE html><html></html>", "page.pth": b"<!DOCTYPE html><html></html>",
        "pickle.pth": pickle.dumps([1, 2], 2), "zip.pth": b"PK\x05\x06" + bytes(18),
        "letters.pt": b"abcdefgh" * 100, "stack.pt": b"\x80\x02)R.",
    }.items():  # fmt: skip
        yield name, data


def test_damaged_files_are_named_in_one_line(tmp_path):
    cases = 0
    for name, data in damaged(tmp_path):
        file = tmp_path / f"bad-{name}"
        file.write_bytes(data)
        with pytest.raises(UserError, match=f"bad-{name}") as error:
            read_checkpoint(file)
        assert "\n" not in str(error.value), name
        cases += 1
    assert cases == 22


def test_missing_files(tmp_path):
    for name in ("none.pth", "none.safetensors"):
        with pytest.raises(UserError, match=rf"There is no file .*{name}\."):
            read_checkpoint(tmp_path / name)
    with pytest.raises(OSError, match="Is a directory"):  # of which scripts tell in a line
        read_checkpoint(tmp_path)
    assert find_source(str(tmp_path), ["*"]) == tmp_path
    with pytest.raises(
        UserError, match="There is no file or folder a/b/c, and a name on the Hub has the form USER/NA"
    ):
        find_source("a/b/c", ["*"])
    with pytest.raises(
        UserError, match=r"someone/none is neither a file, nor a folder, nor can it be had from the Hub"
    ):
        find_source("someone/none", ["*"])


# Loading


def test_names_and_shapes_are_exactly_the_models():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    weights = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    load_strictly(model, weights, "file.pth")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def refused(weights, *told, **options):
        with pytest.raises(UserError) as error:
            load_strictly(model, {name: tensor + 1 for name, tensor in weights.items()}, "file.pth", **options)
        assert str(error.value).startswith("file.pth")
        for text in told:
            assert text in str(error.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    less = {name: tensor for name, tensor in weights.items() if not name.endswith("bias")}
    refused(less, "2 tensors are missing, the first is 0.bias")
    refused(less, "the first is ZERO.bias", published_name=lambda name: name.replace("0", "ZERO"))
    refused(weights | {"2.weight": torch.ones(1)}, "1 are unknown, the first is 2.weight")
    refused(weights | {"1.weight": torch.ones(3)}, "1.weight has the shape (3,), expected (1, 3)")
    refused({"x": torch.ones(1)}, "4 tensors are missing, the first is 0.weight. 1 are unknown, the first is x")


# Writing


def test_a_second_import_is_the_same(tmp_path, capsys):
    source = tmp_path / "weights.pth"
    source.touch()
    written = []
    for _ in range(2):
        torch.manual_seed(0)
        model = SEDDTransformer1DModel(5, hidden_size=8, num_layers=1, num_heads=2, cond_dim=4)
        write(model, arguments(source, tmp_path / "deep" / "out", "--license", "mit"))
        written.append(contents(tmp_path / "deep"))
    assert written[0] == written[1] and len(written[0]) == 3
    loaded = SEDDTransformer1DModel.from_pretrained(tmp_path / "deep" / "out").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    card = (tmp_path / "deep" / "out" / "README.md").read_text()
    assert "license: mit" in card and "| imported from | weights.pth |" in card and str(tmp_path) not in card
    assert 'SEDDTransformer1DModel.from_pretrained("out")' in card
    # What is left of a broken run, and what an import has written before, are replaced.
    (tmp_path / "deep" / ".out.unfinished").mkdir()
    (tmp_path / "deep" / ".out.unfinished" / "old").touch()
    write(MuLawTokenizer(), arguments(source, tmp_path / "deep" / "out"))
    assert {str(path) for path in contents(tmp_path / "deep")} == {
        "out/README.md", "out/config.json", "out/diffusion_pytorch_model.safetensors"
    }  # fmt: skip
    assert f"{tmp_path / 'deep' / 'out'} holds a MuLawTokenizer from {source}" in capsys.readouterr().out


def test_what_no_import_has_written_stays(tmp_path):
    def refused(target):
        before = contents(tmp_path)
        with pytest.raises(UserError, match="holds something that no import has written: name another folder"):
            write(MuLawTokenizer(), arguments("someone/weights", target))
        assert contents(tmp_path) == before

    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("mine")
    refused(tmp_path / "folder")
    (tmp_path / "empty").mkdir()
    write(MuLawTokenizer(), arguments("someone/weights", tmp_path / "empty"))


def test_the_licence_comes_from_the_flag_or_from_the_card(tmp_path):
    source = tmp_path / "source"
    source.mkdir()

    def license_of(*flags):
        write(MuLawTokenizer(), arguments(source, tmp_path / "out", *flags))
        card = (tmp_path / "out" / "README.md").read_text()
        return [line.removeprefix("license: ") for line in card.splitlines() if line.startswith("license: ")]

    assert license_of() == []
    (source / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Weights\n")
    assert license_of() == ["cc-by-nc-4.0"]
    assert license_of("--license=mit") == ["mit"]
    (source / "README.md").write_text("no metadata")
    assert license_of() == []


# The Hub, over HTTP. The client reads its variables when it is imported, hence a process of its own.

SCRIPT = """
import json, sys
from tonefield import MuLawTokenizer
from tonefield.conversion.command import find_source, importer_parser, run_importer

def convert(args):
    folder = find_source(args.source, ["*.json"])
    return MuLawTokenizer(mu=json.loads((folder / "levels.json").read_text()))

for argv in json.loads(sys.argv[1]):
    try:
        run_importer(convert, importer_parser(""), argv)
    except SystemExit as end:
        print("status", end.code or 0)
        print("status", end.code or 0, file=sys.stderr)
"""


def import_with(environment, cwd, *commands):
    """The status of each command, or its last words, what was printed, and the warnings of each."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", SCRIPT, json.dumps([list(command) for command in commands])]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    statuses = [part.splitlines()[0] for part in done.stdout.split("status ")[1:]]
    return statuses, done.stdout, done.stderr.split("status ")


def test_from_the_hub_and_back(tmp_path):
    with FakeHub() as hub:
        hub.files["models", "someone/levels"] = {
            "levels.json": b"31", "README.md": b"---\nlicense: cc-by-nc-4.0\n---\n", "other.bin": b"x",
        }  # fmt: skip
        hub.files["models", "someone/kept"] = {"README.md": b"# Mine"}
        hub.read_only.add(("models", "someone/theirs"))
        hub.files["models", "someone/theirs"] = {}
        statuses, out, warnings = import_with(
            hub.environment(tmp_path / "cache"), tmp_path,
            ["someone/levels", "out", "--push_to_hub=someone/mulaw"],
            ["someone/levels", "out", "--push_to_hub=someone/kept", "--license=mit"],
            ["someone/levels", "out", "--push_to_hub=someone/theirs", "--license=mit"],
            ["someone/nowhere", "out"],
        )  # fmt: skip
        assert not any("other.bin" in request for request in hub.requests)
    pushed = hub.files["models", "someone/mulaw"]
    assert {name for name in pushed if name != ".gitattributes"} == {
        "README.md", "config.json", "diffusion_pytorch_model.safetensors"
    }  # fmt: skip
    card = pushed["README.md"].decode()
    assert CARD_MARK in card and "license: cc-by-nc-4.0" in card and "| imported from | someone/levels |" in card
    assert 'MuLawTokenizer.from_pretrained("someone/mulaw")' in card
    kept = hub.files["models", "someone/kept"]
    assert kept["README.md"] == b"# Mine" and json.loads(kept["config.json"])["mu"] == 31
    assert "pushed to someone/mulaw" in out and "pushed to someone/kept" in out
    assert statuses[:2] == ["0", "0"]
    assert "make sure that you may: the licence cc-by-nc-4.0 may forbid it" in warnings[0]
    assert "warning: before" not in warnings[1]
    assert statuses[2].startswith("error: The model is in out, but was not pushed: ")
    assert statuses[3].startswith("error: someone/nowhere is neither a file, nor a folder, nor can it be had from")
    assert (tmp_path / "out" / "config.json").exists()


def test_without_a_network_or_a_token(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    args = arguments("someone/levels", tmp_path / "out", "--push_to_hub=someone/mulaw")
    with pytest.raises(UserError, match=r"The model is in .*out, but was not pushed: ") as error:
        write(MuLawTokenizer(), args)
    assert "\n" not in str(error.value)
    assert "their licence is not known (--license)" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").exists()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    args.target = str(tmp_path / "other")
    with pytest.raises(UserError, match="--push_to_hub needs a token of the Hub"):
        write(MuLawTokenizer(), args)
    assert not (tmp_path / "other").exists()


def test_the_target_is_checked_before_any_work(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit) as end:
        run_importer(
            lambda args: pytest.fail("it worked"), importer_parser(""), ["someone/weights", str(tmp_path / "mine")]
        )
    assert str(end.value.code).startswith("error: ") and "no import has written" in str(end.value.code)
