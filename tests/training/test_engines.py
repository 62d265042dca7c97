"""FSDP and ZeRO by themselves; that runs with them are runs without them is in test_several_processes.py."""

import importlib.util
import json

import divided_networks
import pytest
import torch
from accelerate import Accelerator
from process_groups import DIVIDED, ZERO, ProcessGroup
from training_runs import RECIPE, train

from tonefield import train_unet, train_vae
from tonefield.command_line import UserError
from tonefield.training.engines import DDP, FSDP, ZeRO, read_launcher
from tonefield.training.loop import make_accelerator


FLAGS = ("--max_train_steps=2", "--num_validation_samples=0")


@pytest.fixture
def launched(monkeypatch):
    """Sets what `accelerate launch` would."""

    def launch(**settings):
        for name, value in settings.items():
            monkeypatch.setenv(name, value)

    return launch


def flags(folder):
    return train_unet.parse_args(["--dataset_name=x", f"--output_dir={folder}", "--train_batch_size=3"])


def test_what_the_launcher_asks_for(launched, tmp_path):
    args = flags(tmp_path)
    assert read_launcher(args) == (DDP, {})
    launched(**DIVIDED)
    assert read_launcher(args) == (FSDP, {"reshard": True})
    assert read_launcher(args) == (DDP, {})  # transformers and accelerate are not to see it
    launched(**DIVIDED, FSDP_RESHARD_AFTER_FORWARD="false")
    assert read_launcher(args) == (FSDP, {"reshard": False})


@pytest.mark.parametrize("offload", [False, True])
def test_what_deepspeed_is_told(offload):
    """On a CPU it makes no difference where the moments are."""
    engine = ZeRO(Accelerator(cpu=True), torch.nn.Linear(1, 1), 1, offload, {"gradient_clipping": 0.5})
    assert engine.config["gradient_clipping"] == 0.5
    told = {"stage": 1, "offload_optimizer": {"device": "cpu"}} if offload else {"stage": 1}
    assert engine.config["zero_optimization"] == told


def test_batches_are_flags_of_the_script(launched, tmp_path):
    launched(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="3")  # of a configuration of DeepSpeed
    assert make_accelerator(flags(tmp_path)).gradient_accumulation_steps == 1


def test_deepspeed_where_it_is_not_installed(launched, tmp_path):
    if importlib.util.find_spec("deepspeed") is not None:
        pytest.skip("it is")
    launched(**ZERO)
    with pytest.raises(UserError, match="DeepSpeed, which is not installed: pip install deepspeed"):
        read_launcher(flags(tmp_path))


@pytest.mark.parametrize("settings, remedy", [
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM, .* use --multi_gpu"),
    (DIVIDED | {"FSDP_VERSION": "1"}, "FSDP 1, .*fsdp_version: 2"),
    (DIVIDED | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params, .*leave it out"),
    (DIVIDED | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "fsdp_activation_checkpointing, .*--gradient_checkpointing"),
    (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage: 3, .*use 1 or 2, or FSDP"),
    (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "nvme, .*only offload_optimizer_device: cpu"),
    (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param_device"),
    (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "deepspeed_config_file: ds.json, .*set zero_stage"),
])  # fmt: skip
def test_what_is_not_supported_is_refused(launched, tmp_path, settings, remedy):
    launched(**settings)
    with pytest.raises(UserError, match=remedy):
        make_accelerator(flags(tmp_path))


def test_one_process_has_nothing_to_divide(launched, mels, tmp_path):
    plain = train(tmp_path / "plain", mels, *FLAGS)
    launched(**DIVIDED)
    alone = train(tmp_path / "alone", mels, *FLAGS)
    losses = [(folder / "metrics.jsonl").read_text().split('"loss": ')[1].split(",")[0] for folder in (plain, alone)]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module", params=[2, 3])
def group(request):
    group = ProcessGroup(request.param, DIVIDED)
    yield group
    group.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", divided_networks.NETWORKS)
def test_each_has_a_share_and_all_have_the_whole(group, name):
    """Every network, with weights whose first dimension cannot be divided evenly, or at all."""
    group.run(divided_networks, [name])
    told = [json.loads(said.splitlines()[-1]) for said in group.said]
    whole = told[0]["whole"]
    assert sum(one["share"] for one in told) == whole
    assert sum(one["moments"] for one in told) == 2 * whole
    assert max(one["share"] for one in told) < 0.75 * whole
    for one in told:
        assert one["blocks kept"] == 0
        assert one["undivided is equal"] and one["restored is equal"] and one["moments are restored"]
        # The same mathematics in the same order, but for how a batch is divided.
        assert one["output differs by"] < 1e-5 and one["weights differ by"] < 1e-5 < one["weights moved by"]


@pytest.mark.slow
def test_blocks_can_be_kept_whole_between_the_passes(group):
    group.run(divided_networks, ["u-net", "--keep"])
    assert [json.loads(said.splitlines()[-1])["blocks kept"] for said in group.said] == [1] * group.count


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", ["u-net", "transformer"])
def test_zero_divides_the_moments(name, stage):
    pytest.importorskip("deepspeed")
    group = ProcessGroup(3, {})  # DeepSpeed is for one run in a process
    group.run(divided_networks, [name, f"--zero={stage}"])
    group.close()
    for said in group.said:
        told = json.loads(said.splitlines()[-1])
        assert 2 * told["whole"] <= 3 * told["moments"] < 2 * told["whole"] + 100  # which fills up the last piece
        assert told["weights differ by"] < 1e-5


@pytest.mark.slow
def test_what_does_not_go_with_it(mels, tmp_path):
    group = ProcessGroup(2, DIVIDED)
    with pytest.raises(AssertionError, match=r"opponent .--discriminator_weight. does not go with FSDP"):
        group.train(tmp_path, mels, *FLAGS, config=RECIPE.with_name("test-tiny-vae.yaml"), script=train_vae)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [DIVIDED, ZERO], ids=["FSDP", "ZeRO"])
def test_bfloat16_as_without(mels, tmp_path, engine):
    """Autocast computes in bfloat16; the weights, and what is averaged, are float32 in both."""
    if engine is ZERO:
        pytest.importorskip("deepspeed")
    runs = []
    for name, settings in (("whole", {}), ("divided", engine)):
        group = ProcessGroup(2, settings)
        flags = (*FLAGS, "--mixed_precision=bf16", "--adam_epsilon=0.01")
        folder = group.train(tmp_path / name, mels, *flags, config=RECIPE, script=train_unet)
        runs.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
        group.close()
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
