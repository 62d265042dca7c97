"""What is saved loads with tonefield, trusting nothing, and with diffusers alone, in fresh processes."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from exact_networks import quiet
from fake_hub import FakeHub
from published_vocoders import write_bigvgan
from token_networks import random_token_pipe

import tonefield
from tonefield import (
    MelPFGMPipeline,
    MelSpectrogram,
    PFGMTransformerUNet2DModel,
    PFGMUNet2DModel,
    PoissonFlowScheduler,
)
from tonefield.models import load_vocoder


ROOT = Path(__file__).resolve().parents[2]
CARD = {
    "license": "cc-by-4.0",
    "datasets": ["someone/sounds"],
    "description": "Two tones.",
    "training_steps": 1200,
    "seconds_per_step": 0.5,
}
# Names that are in no alphabetical order, and one that diffusers or tonefield could take for a class.
LABELS = {"tom {1}": 0, "MelSpectrogram": 1, "kick": 2}
GENERATE = """
generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
pipe.set_progress_bar_config(disable=True)
labels = ["tom {1}", "MelSpectrogram"]
sound = pipe(2, labels, 3, 2.0, generator=generators)
np.save("sound.npy", sound.audios)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("repositories")


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """An interpreter that sees this one's packages, but not tonefield."""
    folder = tmp_path_factory.mktemp("bare") / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture
def run(work):
    """Runs code in a fresh process, elsewhere than in the source; with tonefield if the interpreter is this one."""

    def run(code, python=sys.executable, cwd=work, **variables):
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
        environment |= {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1", **variables}
        if python == sys.executable:
            environment["PYTHONPATH"] = str(ROOT)
            environment["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
        else:
            code = "import importlib.util as i; assert i.find_spec('tonefield') is None\n" + code
        code = "import numpy as np, torch\n" + code
        done = subprocess.run([python, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture
def saved(random_pipe, work):
    """A saved pipeline and the sounds that it makes."""
    folder = work / "two-tones"
    pipe = quiet(MelPFGMPipeline(**random_pipe.components, card=CARD, label2id=LABELS))
    if not folder.exists():
        pipe.save_pretrained(folder)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    sounds = pipe(2, class_labels=[0, 1], guidance_scale=2.0, num_inference_steps=3, generator=generators).audios
    return folder, sounds


def heard(folder):
    file = folder / "sound.npy"
    sounds = np.load(file)
    file.unlink()
    return sounds


def test_with_tonefield_nothing_is_trusted(saved, run, work):
    code = "import tonefield\nfor load in tonefield.load, tonefield.MelPFGMPipeline.from_pretrained:\n"
    code += "    pipe = load('two-tones')\n    assert type(pipe) is tonefield.MelPFGMPipeline\n"
    run(code + "    assert type(pipe.mel) is tonefield.MelSpectrogram" + GENERATE)
    np.testing.assert_array_equal(heard(work), saved[1])
    assert not (work / "modules").exists()


def test_without_tonefield_and_saved_again(saved, run, work, bare_python):
    load = "from diffusers import DiffusionPipeline\n"
    load += "pipe = DiffusionPipeline.from_pretrained('{}', trust_remote_code=True)"
    done = run(load.format("two-tones") + GENERATE + "pipe.save_pretrained('again')", bare_python)
    assert "Expected types" not in done.stderr
    np.testing.assert_array_equal(heard(work), saved[1])
    # What was saved from there is the same repository, and works both ways.
    files = {path.relative_to(saved[0]) for path in saved[0].rglob("*") if path.is_file()}
    assert files == {path.relative_to(work / "again") for path in (work / "again").rglob("*") if path.is_file()}
    for file in files - {Path("README.md")}:
        assert (work / "again" / file).read_bytes() == (saved[0] / file).read_bytes(), file
    run("import tonefield\npipe = tonefield.load('again')" + GENERATE)
    np.testing.assert_array_equal(heard(work), saved[1])


TOKENS = """
generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
pipe.set_progress_bar_config(disable=True)
sound = pipe(class_labels=[0, 1], guidance_scale=2.0, num_frames=12, loop=True, generator=generators)
np.save("sound.npy", sound.audios)
"""


def test_token_pipelines_with_and_without_tonefield(run, work, bare_python):
    pipe = random_token_pipe(hop=2, layout="flatten", num_classes=2)
    pipe.save_pretrained(work / "tokens")
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    sound = pipe(class_labels=[0, 1], guidance_scale=2.0, num_frames=12, loop=True, generator=generators)
    run("import tonefield\npipe = tonefield.load('tokens')" + TOKENS)
    np.testing.assert_array_equal(heard(work), sound.audios)
    load = "from diffusers import DiffusionPipeline\n"
    load += "pipe = DiffusionPipeline.from_pretrained('tokens', trust_remote_code=True)"
    done = run(load + TOKENS + "pipe.save_pretrained('tokens-again')", bare_python)
    assert "Expected types" not in done.stderr
    np.testing.assert_array_equal(heard(work), sound.audios)
    files = {path.relative_to(work / "tokens") for path in (work / "tokens").rglob("*") if path.is_file()}
    for file in files - {Path("README.md")}:
        assert (work / "tokens-again" / file).read_bytes() == (work / "tokens" / file).read_bytes(), file


SPEAK = """
pipe.set_progress_bar_config(disable=True)
generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
np.save("sound.npy", pipe(["a low tone", "drums"], num_inference_steps=2, generator=generators).audios)
"""


def test_text_pipelines_travel(text_pipe, run, work, bare_python):
    text_pipe.save_pretrained(work / "words")
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    expected = text_pipe(["a low tone", "drums"], num_inference_steps=2, generator=generators).audios
    load = "from diffusers import DiffusionPipeline\n"
    load += "pipe = DiffusionPipeline.from_pretrained('words', trust_remote_code=True)"
    done = run(load + SPEAK + "pipe.save_pretrained('words-again')", bare_python)
    assert "Expected types" not in done.stderr
    # Griffin-Lim makes more of last digits, which may depend on where weights lie in memory.
    np.testing.assert_allclose(heard(work), expected, atol=2e-3)
    pipe = quiet(tonefield.load(work / "words-again"))
    assert type(pipe) is tonefield.LatentAudioDiffusionPipeline and type(pipe.mel) is tonefield.MelSpectrogram
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    again = pipe(["a low tone", "drums"], num_inference_steps=2, generator=generators).audios
    np.testing.assert_allclose(again, expected, atol=2e-3)
    card = (work / "words" / "README.md").read_text()
    assert 'pipe("a few words")' in card and "| text_encoder | `T5EncoderModel` |" in card
    # Without the networks that sound is made with, it still encodes what they will read.
    reader = tonefield.load(work / "words", unet=None, vae=None)
    for ours, theirs in zip(reader.encode_prompt("drums"), text_pipe.encode_prompt("drums"), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_vocoders_travel(run, work, bare_python):
    """Also the one that diffusers has only within a pipeline."""
    write_bigvgan(work / "vocoder", second=False)
    mel = MelSpectrogram(8000, 64, 8, 16, 32, method="bigvgan")
    unet = UNet2DModel((16, 32), 1, 1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                       block_out_channels=(8,), norm_num_groups=4)  # fmt: skip
    pipe = quiet(MelPFGMPipeline(unet.eval(), PoissonFlowScheduler(), mel, load_vocoder(work / "vocoder")))
    pipe.save_pretrained(work / "spoken")
    expected = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0)).audios
    run(
        "from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained('spoken', trust_remote_code=True)\n"
        "assert type(pipe.vocoder).__name__ == 'LTX2Vocoder'\n"
        "sound = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0))\n"
        "np.save('sound.npy', sound.audios)",
        bare_python,
    )
    np.testing.assert_allclose(heard(work), expected, atol=1e-5)


def test_without_trust_diffusers_refuses(saved):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(saved[0])


def test_card(saved, run, bare_python):
    card = (saved[0] / "README.md").read_text()
    for line in ("license: cc-by-4.0", "- someone/sounds", "library_name: diffusers", "# two-tones", "Two tones."):
        assert line in card.splitlines()
    for line in (
        "| classes | tom {1}, MelSpectrogram, kick |",
        "| training steps | 1200 |",
        "| license | cc-by-4.0 |",
        "| datasets | someone/sounds |",
    ):
        assert line in card.splitlines()
    assert re.search(r"\| unet \| `UNet2DModel` \| [\d,]{6,} \|", card)
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == 2
    assert all("pipe(class_labels='tom {1}')" in snippet for snippet in snippets)
    for snippet, python in zip(snippets, (bare_python, sys.executable), strict=True):
        run(snippet, python, cwd=saved[0].parent)
        samples, rate = soundfile.read(saved[0].parent / "sound.wav")
        assert (len(samples), rate) == (2047, 8000)
        (saved[0].parent / "sound.wav").unlink()


def test_card_of_a_person_stays(random_pipe, tmp_path):
    random_pipe.save_pretrained(tmp_path)
    written = (tmp_path / "README.md").read_text()
    assert tonefield.load(tmp_path).config.card is None and "## Training" not in written and "pipe()" in written
    random_pipe.register_to_config(card={"license": "mit"})
    random_pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() != written
    (tmp_path / "README.md").write_text("My words.")
    random_pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "My words."


def test_facts_travel_with_the_pipeline(saved, tmp_path):
    pipe = tonefield.load(saved[0])
    assert pipe.config.card == CARD and list(pipe.config.label2id) == list(LABELS)
    pipe.save_pretrained(tmp_path / "two-tones")
    assert (tmp_path / "two-tones" / "README.md").read_text() == (saved[0] / "README.md").read_text()
    index = json.loads((tmp_path / "two-tones" / "model_index.json").read_text())
    assert index == json.loads((saved[0] / "model_index.json").read_text())


PUSH = """
import tonefield
pipe = tonefield.load("two-tones")
pipe.register_to_config(card={"pushed": "once"})
pipe.push_to_hub("someone/tones")
pipe.register_to_config(card={"pushed": "again"})
pipe.push_to_hub("someone/tones")
pipe.push_to_hub("someone/mine")
pipe.save_pretrained("tones-too", push_to_hub=True, repo_id="someone/tones-too")
pipe = tonefield.load("someone/tones")
"""


def test_hub(saved, run, work, bare_python):
    with FakeHub() as hub:
        hub.files["models", "someone/mine"] = {"README.md": b"---\nlicense: mit\n---\nMy words.\n"}
        run(PUSH + GENERATE, **hub.environment(work / "cache"))
        np.testing.assert_array_equal(heard(work), saved[1])
        for name in ("someone/tones", "someone/tones-too"):
            files = hub.files["models", name]
            assert {"model_index.json", "pipeline_mel_pfgm.py", "scheduler/scheduling_poisson_flow.py"} <= set(files)
            card = files["README.md"].decode()
            assert f'tonefield.load("{name}")' in card and "| pushed | again |" in card
        # A card that a person has written stays.
        mine = hub.files["models", "someone/mine"]
        assert "My words." in mine["README.md"].decode() and "pipeline_mel_pfgm.py" in mine
        load = "from diffusers import DiffusionPipeline\n"
        load += "pipe = DiffusionPipeline.from_pretrained('someone/tones', trust_remote_code=True)"
        run(load + GENERATE, bare_python, **hub.environment(work / "bare"))
        np.testing.assert_array_equal(heard(work), saved[1])


PUBLISHED = {
    "field": lambda: PFGMUNet2DModel(
        sample_size=(16, 32), in_channels=1, out_channels=2, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), downsample_type="resnet",
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), upsample_type="resnet", num_class_embeds=4,
    ),
    "transformer": lambda: PFGMTransformerUNet2DModel(
        sample_size=(16, 32), in_channels=1, out_channels=2, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), num_class_embeds=4,
    ),
}  # fmt: skip


def test_networks_travel_too(mel, run, work, bare_python):
    """Networks that are neither diffusers' nor the same class, all of one process's repositories."""
    expected = {}
    for name, make in PUBLISHED.items():
        torch.manual_seed(0)
        unet = make().eval()
        torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
        scheduler = PoissonFlowScheduler(aug_dim=1, prediction_type="field", z_exp=1.0, prior_radius_quantile=0.9)
        pipe = quiet(MelPFGMPipeline(unet, scheduler, mel, label2id=LABELS))
        pipe.save_pretrained(work / name)
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        labels = dict(class_labels=[0, 1], guidance_scale=2.0, num_inference_steps=3)
        expected[name] = pipe(2, generator=generators, **labels).audios
    load = "from diffusers import DiffusionPipeline\nfor name in 'field', 'transformer':\n"
    body = "pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)" + GENERATE
    body += "np.save(name + '.npy', sound.audios)\npipe.save_pretrained(name + '-again')"
    run(load + textwrap.indent(body, "    "), bare_python)
    for name, sounds in expected.items():
        np.testing.assert_array_equal(np.load(work / f"{name}.npy"), sounds)
        assert type(tonefield.load(work / f"{name}-again").unet) is type(PUBLISHED[name]())


# What cannot be saved or loaded


@pytest.mark.parametrize(("line", "message"), [
    ("import tonefield.schedulers", "odd_scheduler.py imports tonefield, which may be absent"),
    ("if False:\n    from .sibling import x", "odd_scheduler.py imports from `.sibling`.*use only absolute imports"),
])  # fmt: skip
def test_components_that_cannot_travel(random_pipe, tmp_path, monkeypatch, line, message):
    code = f"{line}\nfrom diffusers import EDMEulerScheduler\nclass OddScheduler(EDMEulerScheduler): pass\n"
    (tmp_path / "odd_scheduler.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_scheduler", raising=False)
    import odd_scheduler

    pipe = MelPFGMPipeline(random_pipe.unet, odd_scheduler.OddScheduler(), random_pipe.mel)
    with pytest.raises(ValueError, match=message):
        pipe.save_pretrained(tmp_path / "saved")


def test_errors_of_load(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model_index.json"):
        tonefield.load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="holds a StableDiffusionPipeline, which is no pipeline of tonefield"):
        tonefield.load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": ["scheduling_x", "PoissonFlowScheduler"]}')
    with pytest.raises(ValueError, match="holds a PoissonFlowScheduler, which is no pipeline"):
        tonefield.load(tmp_path)
    with pytest.raises(OSError, match="no/such is neither a folder nor a pipeline on the Hub") as error:
        tonefield.load("no/such")
    assert "\n" not in str(error.value)
