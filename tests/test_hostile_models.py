"""Models made to do harm: none runs code, reads or writes elsewhere; each loads or is refused in one line."""

import json
import os
import pickle
import shutil
import struct
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_pipes import save_small_pipes

import tonefield
from tonefield import MelSpectrogram, SEDDTransformer1DModel, evaluate, inference
from tonefield.command_line import UserError
from tonefield.conversion.command import read_checkpoint
from tonefield.evaluation.encoders import load_feature_extractor
from tonefield.evaluation.image_sets import TransformersEncoder
from tonefield.models import load_audio_tokenizer, load_vocoder
from tonefield.training.latents import open_vae


WEIGHTS = "diffusion_pytorch_model.safetensors"

# What Python tells of while code is watched. A hook cannot be taken back, hence the list that is there or not.
WATCHED: list[tuple] | None = None
RUNS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "socket.connect"}
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}


def _hook(event: str, args: tuple) -> None:
    if WATCHED is None:
        return
    if event in RUNS | CHANGES or (event == "import" and args[0].split(".")[-1].startswith("evil")):
        WATCHED.append((event, *map(str, args)))
    elif event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        path, mode = os.fspath(args[0]), args[1] or ""
        if "secret" in str(path) or set(mode) & set("wax+"):
            WATCHED.append((event, str(path), mode))


sys.addaudithook(_hook)


@contextmanager
def watching():
    """What is done meanwhile, as far as it could do harm."""
    global WATCHED
    WATCHED = found = []
    try:
        yield found
    finally:
        WATCHED = None


def test_the_hook_sees_what_it_is_to_see(tmp_path):
    """Otherwise the other tests would prove nothing."""
    with watching() as found:
        pickle.loads(pickle.dumps(Evil(tmp_path / "made")))
        (tmp_path / "secret").write_text("")
        (tmp_path / "secret").read_text()
    assert [event for event, *_ in found] == ["pickle.find_class", "os.mkdir", "open", "open"]


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return save_small_pipes(tmp_path_factory.mktemp("models"))


@pytest.fixture
def copy(models, tmp_path):
    def copy(kind: str) -> Path:
        (tmp_path / "secret.json").write_text("{}")
        return Path(shutil.copytree(models[kind], tmp_path / "model"))

    return copy


def rewrite(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder: Path, message: str, load=tonefield.load, kinds=(OSError, ValueError)) -> None:
    with watching() as found, pytest.raises(kinds, match=message) as error:
        load(str(folder))
    assert found == [], error.value


def loaded(folder: Path):
    with watching() as found:
        pipe = tonefield.load(str(folder))
    assert found == []
    return pipe


# ----- code and pickles


@pytest.mark.parametrize("kind, part, name", [
    ("mel", "unet", "diffusion_pytorch_model"), ("mel", "mel", "diffusion_pytorch_model"),
    ("text", "text_encoder", "model"), ("tokens", "transformer", "diffusion_pytorch_model"),
])  # fmt: skip
@pytest.mark.parametrize("evil", [True, False])
def test_pickled_weights_are_refused(copy, tmp_path, kind, part, name, evil):
    """Also those that do no harm."""
    file = copy(kind) / part / f"{name}.safetensors"
    weights = Evil(tmp_path / "made") if evil else load_file(file)
    torch.save(
        weights, file.with_name(f"{name.replace('model', 'pytorch_model') if part == 'text_encoder' else name}.bin")
    )
    file.unlink()
    refused(tmp_path / "model", f"no file named {name}.safetensors")
    assert not (tmp_path / "made").exists()


def test_pickles_beside_the_weights_are_not_touched(copy, tmp_path):
    folder = copy("mel")
    for place in folder, folder / "unet", folder / "mel", folder / "scheduler":
        for name in "diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt", "last.ckpt", "scheduler.pkl":
            (place / name).write_bytes(pickle.dumps(Evil(tmp_path / "made")))
    loaded(folder)


@pytest.mark.parametrize("kind", ["mel", "text", "tokens"])
def test_code_of_a_folder_is_not_run(copy, tmp_path, kind):
    """The code that travels with a model is for those who have no tonefield; in its place may stand anything."""
    folder = copy(kind)
    evil = f"import os\nos.mkdir({str(tmp_path / 'made')!r})\n"
    for file in folder.rglob("*.py"):
        file.write_text(evil)
    for place in [folder, *(path for path in folder.iterdir() if path.is_dir())]:
        for name in "evil.py", "__init__.py", "sitecustomize.py", "modeling_evil.py":
            (place / name).write_text(evil)
    for file in folder.rglob("*config.json"):
        rewrite(
            file, auto_map={"AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}, trust_remote_code=True
        )
    assert type(loaded(folder)).__module__.startswith("tonefield.")


EVIL = ["evil", "Evil"]


@pytest.mark.parametrize("changes, message", [
    (dict(unet=["os", "system"]), "cannot be loaded as it does not seem to have any of the loading methods"),
    (dict(unet=["subprocess", "Popen"]), "loading methods"), (dict(unet=["builtins", "eval"]), "loading methods"),
    (dict(unet=EVIL), "contains custom code in evil.py which must be executed"),
    (dict(unet=["../secret", "UNet2DModel"]), "not one of the libraries"),
    (dict(unet=["evil_package", "X"]), "not one of"),
    (dict(unet=["diffusers", "__class__"]), "loading methods"),
    (dict(unet=["transformers", "pipeline"]), "is damaged"),
    (dict(unet=["diffusers", "DDIMScheduler"]), "no file named scheduler_config.json"),
    (dict(unet=3), "is damaged: TypeError"), (dict(unet=[]), "is damaged: IndexError"),
    (dict(unet={"a": 1}), "damaged"),
    (dict(unet=[["a"], ["b"]]), "is damaged"), (dict(unet=[None, None]), "expected .* but only"),
    (dict(_class_name=EVIL), "holds a Evil, which is no pipeline of tonefield"),
    (dict(_class_name="os.system"), "no pipeline"),
    (dict(_class_name="load"), "no pipeline"), (dict(_class_name="MelSpectrogram"), "no pipeline"),
    (dict(_class_name={"a": 1}), "no pipeline"), (dict(_class_name=None), "names no pipeline"),
    (dict(_class_name=[]), "names no pipeline"), (dict(_class_name="SEDDTokenPipeline"), "expected .* but only"),
    (dict(label2id={"a": "x"}), "label2id is"), (dict(label2id=[1]), "is damaged"),
])  # fmt: skip
def test_what_an_index_names_is_not_called(copy, tmp_path, changes, message):
    folder = copy("mel")
    for file in folder / "evil.py", folder / "unet" / "evil.py":
        file.write_text(f"import os\nos.mkdir({str(tmp_path / 'made')!r})\nclass Evil: pass\n")
    rewrite(folder / "model_index.json", **changes)
    refused(folder, message)


@pytest.mark.parametrize("text", ["[1]", "[" * 10**5, "", "null", "{}", '"x"', "\x00"])
def test_indices_that_are_none(copy, text):
    folder = copy("mel")
    (folder / "model_index.json").write_text(text)
    refused(folder, "names no pipeline|neither a folder nor a pipeline")


def test_more_components_than_there_are_are_left_alone(copy, tmp_path):
    folder = copy("mel")
    rewrite(folder / "model_index.json", **{"evil": ["os", "system"], "../secret": ["diffusers", "UNet2DModel"]})
    assert set(loaded(folder).components) == {"unet", "scheduler", "mel", "vocoder"}


# ----- weights and settings


def header(file: Path, change) -> None:
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + size])
    entries.pop("__metadata__", None)
    change(entries)
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def first(**changes):
    return lambda entries: next(iter(entries.values())).update(changes)


def overlap(entries) -> None:
    one = next(iter(entries.values()))
    for entry in entries.values():
        entry["data_offsets"] = one["data_offsets"]


@pytest.mark.parametrize("damage", [
    lambda f: f.write_bytes(b""), lambda f: f.write_bytes(f.read_bytes()[:300]),
    lambda f: f.write_bytes(struct.pack("<Q", 2**63) + f.read_bytes()[8:]),
    lambda f: f.write_bytes(struct.pack("<Q", 90_000_000) + f.read_bytes()[8:]),
    lambda f: header(f, first(data_offsets=[0, 10**12])), lambda f: header(f, first(data_offsets=[-4, 0])),
    lambda f: header(f, first(shape=[2**40, 2**40])), lambda f: header(f, first(dtype="EVIL")),
    lambda f: header(f, overlap),
])  # fmt: skip
def test_safetensors_with_headers_of_no_sense(copy, damage):
    folder = copy("mel")
    damage(folder / "unet" / WEIGHTS)
    refused(folder, "Unable to load weights")


@pytest.mark.parametrize("kind, part", [
    ("mel", "unet"), ("mel", "mel"), ("text", "unet"), ("text", "text_encoder"), ("tokens", "transformer"),
])  # fmt: skip
def test_weights_that_are_not_all_there(copy, kind, part):
    """diffusers and transformers would fill the gap with random numbers."""
    folder = copy(kind)
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    name = min(weights)
    tensor = weights.pop(name)
    for rest in weights, weights | {"another": tensor}:
        save_file(rest, file, {"format": "pt"})
        refused(folder, f"^1 tensors of the {part} of .* are missing, the first is {name}.$")
    save_file(weights | {name: torch.zeros(3)}, file)
    refused(folder, "expected shape|mismatch")


def test_weights_in_several_files(copy, models):
    pipe = tonefield.load(str(copy("mel")))
    folder = Path(models["mel"]).parent / "sharded"
    pipe.save_pretrained(folder, max_shard_size="10KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 2
    again = tonefield.load(str(folder))
    for name, tensor in pipe.unet.state_dict().items():
        torch.testing.assert_close(again.unet.state_dict()[name], tensor, rtol=0, atol=0)


def test_attention_of_old_names_is_complete(tmp_path, copy):
    """What diffusers renames when it loads is not missing."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, latent_channels=1)
    vae.save_pretrained(tmp_path / "old" / "vae")
    file = tmp_path / "old" / "vae" / WEIGHTS
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in load_file(file).items():
        for new, before in renames.items():
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = tensor
    assert any("proj_attn" in name for name in old)
    save_file(old, file)
    assert open_vae(str(tmp_path / "old"))[0].state_dict().keys() == vae.state_dict().keys()
    del old["encoder.conv_in.weight"]
    save_file(old, file)
    with pytest.raises(
        UserError, match=r"^--vae .* cannot be loaded: 1 tensors of vae are missing, the first is encoder"
    ):
        open_vae(str(tmp_path / "old"))


@pytest.mark.parametrize("kind, file, changes", [
    ("mel", "unet/config.json", dict(block_out_channels=[10**6, 10**6])),
    ("mel", "unet/config.json", dict(layers_per_block="x")),
    ("mel", "mel/config.json", dict(n_fft=10**9)), ("mel", "mel/config.json", dict(num_frames=10**12)),
    ("mel", "scheduler/scheduler_config.json", dict(num_train_timesteps=10**15)),
    ("mel", "scheduler/scheduler_config.json", dict(aug_dim="x")),
    ("text", "scheduler/scheduler_config.json", dict(num_train_timesteps=10**12)),
    ("text", "text_encoder/config.json", dict(d_ff=2**33)),
    ("text", "tokenizer/tokenizer.json", dict(added_tokens=None)),
    ("tokens", "transformer/config.json", dict(vocab_size=10**10)),
    ("tokens", "transformer/config.json", dict(num_heads=0)),
    ("tokens", "transformer/config.json", dict(hidden_size=2**20)),
])  # fmt: skip
def test_settings_of_no_sense(copy, kind, file, changes):
    """Trillions of parameters are refused without taking memory."""
    folder = copy(kind)
    rewrite(folder / file, **changes)
    before = peak()
    refused(folder, "is damaged: |is at most|Cannot load|tensors of the")
    assert peak() - before < 2**18  # kB


def peak() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def test_weights_that_are_no_numbers_make_no_file(copy, tmp_path):
    folder = copy("mel")
    file = folder / "unet" / WEIGHTS
    save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)
    flags = [f"--model={folder}", f"--output_dir={tmp_path / 'out'}", "--steps=2", "--num_samples=1"]
    with pytest.raises(UserError, match=r"not finite|not a finite number"):
        inference.main(inference.parse_args(flags))
    assert not list((tmp_path / "out").glob("*.wav"))


# ----- scripts, codecs, vocoders, importers


def test_commands_say_so_in_one_line(copy, capsys):
    folder = copy("tokens")
    rewrite(folder / "transformer" / "config.json", num_heads=0)
    with pytest.raises(UserError, match=r"^--model .* cannot be loaded: .* is damaged: ZeroDivisionError") as error:
        inference.main(inference.parse_args([f"--model={folder}"]))
    assert "\n" not in str(error.value)


def test_folders_of_codecs_and_vocoders(copy, tmp_path, capsys):
    folder = copy("tokens") / "audio_tokenizer"
    MelSpectrogram.from_preset("fsdd-64").save_pretrained(tmp_path / "mel")
    (tmp_path / "bigvgan").mkdir()
    (tmp_path / "bigvgan" / "config.json").write_text(json.dumps({"upsample_initial_channel": 10**9}))
    (tmp_path / "bigvgan" / "bigvgan_generator.pt").write_bytes(pickle.dumps({"generator": Evil(tmp_path / "made")}))
    (tmp_path / "evil").mkdir()
    names = ("AutoConfig", "AutoModel", "AutoFeatureExtractor", "AutoImageProcessor", "AutoTokenizer")
    config = {"model_type": "evil", "auto_map": dict.fromkeys(names, "evil.Evil")}
    for name in "config.json", "preprocessor_config.json", "tokenizer_config.json":
        (tmp_path / "evil" / name).write_text(json.dumps(config))
    (tmp_path / "evil" / "evil.py").write_text("import os\nos.mkdir('made')\n")
    load_audio_tokenizer(folder)
    refused(tmp_path / "evil", "custom code|trust_remote_code|evil", load_audio_tokenizer)
    refused(tmp_path / "evil", "has no settings of its input: .*custom code", load_feature_extractor, UserError)
    refused(
        tmp_path / "evil", "neither inception=FILE nor an image model .*custom code", TransformersEncoder, UserError
    )
    assert "[y/N]" not in capsys.readouterr().out  # nobody is asked whether to run it
    refused(tmp_path / "mel", "holds a MelSpectrogram, which is no audio tokenizer", load_audio_tokenizer)
    refused(tmp_path / "mel", "holds a MelSpectrogram, which is no vocoder", load_vocoder)
    refused(tmp_path / "bigvgan", ".", load_vocoder)


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.bin", "a.pkl"])
def test_importers_do_not_run_what_they_read(tmp_path, name):
    torch.save({"state_dict": Evil(tmp_path / "made")}, tmp_path / name)
    (tmp_path / f"raw-{name}").write_bytes(pickle.dumps(Evil(tmp_path / "made")))
    for file in tmp_path / name, tmp_path / f"raw-{name}":
        refused(
            file,
            "^[^\n]*(it was not run|is damaged or no checkpoint)[^\n]*$",
            lambda name: read_checkpoint(Path(name)),
            UserError,
        )


def test_a_classifier_of_anybody(tmp_path):
    SEDDTransformer1DModel(4, hidden_size=16, num_layers=1, num_heads=2).save_pretrained(tmp_path / "other")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text('{"_class_name": "SoundClassifier", "labels": 3}')
    torch.save(Evil(tmp_path / "made"), tmp_path / "none" / "diffusion_pytorch_model.bin")
    from tonefield.evaluation.classifier import load_sound_classifier

    for name in "other", "none":
        message = r"is not a classifier that evaluate.py train-classifier has made"
        refused(tmp_path / name, message, load_sound_classifier, UserError)


def test_states_in_a_checkpoint_are_not_run(tmp_path):
    from accelerate import Accelerator

    from tonefield.training.checkpoints import Checkpoints
    from tonefield.training.engines import DDP

    torch.save(Evil(tmp_path / "made"), tmp_path / "random_states_0.pkl")
    checkpoints = Checkpoints(DDP(Accelerator(cpu=True), torch.nn.Identity()), tmp_path, {})
    with watching() as found:
        checkpoints.restore(tmp_path)  # where the state of a generator cannot be read, a run goes on without it
    assert found == []


# ----- manifests


def test_a_manifest_is_checked_like_flags(copy, tmp_path, capsys):
    folder = copy("mel")
    out = tmp_path / "out"
    inference.main(inference.parse_args([f"--model={folder}", f"--output_dir={out}", "--steps=2", "--num_samples=1"]))
    line = json.loads((out / "manifest.jsonl").read_text())

    def again(**changes):
        (out / "other.jsonl").write_text(json.dumps(line | changes))
        inference.main(inference.parse_args(["--again", str(out / "other.jsonl")]))

    for changes, message in [
        (dict(settings=[1]), "is no manifest: its line 0 has no settings"),
        (dict(index="../x"), "line 0 has no index"),
        (dict(index=10**9), "sound 1000000000 is none of the 1"), (dict(sha256=None), "has no sha256"),
        (dict(settings=line["settings"] | {"config": "/etc/passwd"}), "sets 'config'"),
        (dict(settings=line["settings"] | {"output_dir": "/tmp/x"}), "sets 'output_dir'"),
        (dict(settings=line["settings"] | {"evil": 1}), "sets 'evil'"),
        (dict(settings=line["settings"] | {"files": {"/etc/hosts.txt": "0" * 64}}), "has changed or is gone"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            again(**changes)
    for changes, message in [
        ({"steps": "x"}, "--steps: invalid int value"),
        ({"output_format": "/../../evil.wav"}, "--output_format: invalid"),
        ({"seed": {"a": 1}}, "--seed: invalid int"), ({"inpaint": [[1, 0]]}, "does not end after it starts"),
    ]:  # fmt: skip
        with pytest.raises(SystemExit):
            again(settings=line["settings"] | changes)
        assert message in capsys.readouterr().err
    (out / "other.jsonl").write_text("[" * 10**5)
    with pytest.raises(UserError, match="is no manifest: "):
        inference.main(inference.parse_args(["--again", str(out / "other.jsonl")]))


def test_every_flag_comes_back_from_a_manifest():
    flags = [
        "--prompt=a",
        "--prompt=-b",
        "--class_label=x",
        "--loop",
        "--seconds=0.1",
        "--inpaint=0.25:1.5",
        "--audio=a.wav",
    ]
    flags += ["--inpaint=2:3", "--strength=0.3333333333333333", "--output_format=flac", "--seed=7", "--eta=1e-09"]
    args = inference.parse_args(flags)
    settings = {
        name: value for name, value in vars(args).items() if value is not None and name not in inference.PLACES
    }
    assert vars(inference.parse_args(inference.flags_of(json.loads(json.dumps(settings))))) == vars(args)
    args = inference.parse_args(["--interpolate", "1", "song.wav", "5"])
    assert inference.parse_args(inference.flags_of({"interpolate": args.interpolate})).interpolate == args.interpolate


def test_a_report_and_a_page_escape_what_they_show(tmp_path):
    """Names of files, folders and classes are text in a page, not a part of it."""
    import numpy as np
    import soundfile

    name = "<script>alert(1)</script>&\"'"
    for folder in "real", name.replace("/", "_"):
        (tmp_path / folder / "<img src=x onerror=alert(1)>").mkdir(parents=True)
        for i in range(3):
            noise = 0.1 * np.random.default_rng(i).standard_normal(8000)
            soundfile.write(tmp_path / folder / "<img src=x onerror=alert(1)>" / f"<b>{i}.wav", noise, 8000)
    out = tmp_path / "report.json"
    folders = [str(tmp_path / "real"), str(tmp_path / name.replace("/", "_"))]
    evaluate.main(
        evaluate.parse_args(
            [
                "--reference",
                folders[0],
                "--generated",
                folders[1],
                "--metrics",
                "sounds",
                "--no_cache",
                "--out",
                str(out),
            ]
        )
    )
    pages = [path.read_text() for path in tmp_path.rglob("*.html")]
    assert pages
    for page in pages:
        assert "<img src=x" not in page and "<script>alert" not in page and "<b>0.wav" not in page
        assert "&lt;script&gt;alert(1)" in page
