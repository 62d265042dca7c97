"""The templates of recipes/slurm, as SLURM runs them: pre-empted, cancelled, on several nodes, in arrays."""

import pytest
from fake_slurm import FakeSlurm
from training_runs import RECIPE, contents, differences, train


pytestmark = pytest.mark.slow

ONE, MANY, BUILD = (f"recipes/slurm/{name}.sbatch" for name in ("train_one_node", "train_many_nodes", "build_dataset"))
# So many steps that it will not have ended before the signal arrives, and as many as it may do beyond it.
STEPS = ("--lr_scheduler=constant", "--max_train_steps=30", "--checkpointing_steps=10", "--logging_steps=2")


@pytest.fixture
def slurm(tmp_path):
    (tmp_path / "slurm").mkdir()
    return FakeSlurm(tmp_path / "slurm")


def training(mels, folder, *more):
    return ["train_unet.py", f"--config={RECIPE}", f"--dataset_name={mels}", f"--output_dir={folder}", *STEPS, *more]


def step_of(folder):
    return max(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


def run_with_a_break(job, folder):
    """Pre-empts a job in the middle of its training, requeues it as it asks for, and lets it finish."""
    job.start().wait_for(folder / "checkpoint-10")
    status, output = job.preempt()
    assert status == 75, output
    assert "by SIGUSR1; continue with --resume_from_checkpoint latest" in output
    assert job.requeued
    assert 10 < step_of(folder) < 30, "the signal came too late"
    broken_at = step_of(folder)
    job.slurm.requeued.unlink()
    status, output = job.start().end()
    assert status == 0, output
    assert f"continuing from {folder}/checkpoint-{broken_at}, step {broken_at}" in output
    assert not job.requeued


def test_one_node_is_preempted_and_ends_as_if_it_had_not_been(mels, tmp_path, slurm):
    one = {"ntasks-per-node": 1}
    run_with_a_break(slurm.sbatch(ONE, *training(mels, tmp_path / "out"), options=one), tmp_path / "out")
    whole = train(tmp_path / "whole", mels, *STEPS)
    assert differences(tmp_path / "out" / "checkpoint-30", whole / "checkpoint-30") == []
    assert (tmp_path / "out" / "model_index.json").exists()


def test_two_nodes_are_preempted_and_end_as_if_they_had_not_been(mels, tmp_path, slurm):
    two = {"nodes": 2, "ntasks-per-node": 1}
    run_with_a_break(slurm.sbatch(MANY, *training(mels, tmp_path / "out"), options=two), tmp_path / "out")
    status, output = slurm.sbatch(MANY, *training(mels, tmp_path / "whole"), options=two).start().end()
    assert status == 0, output
    assert "the run begins at step 0" in output
    assert differences(tmp_path / "out" / "checkpoint-30", tmp_path / "whole" / "checkpoint-30") == []
    assert {path.name for path in (tmp_path / "out" / "checkpoint-30").glob("random_states*")} == {
        "random_states_0.pkl", "random_states_1.pkl"
    }  # fmt: skip


def test_a_cancelled_job_saves_and_does_not_come_back(mels, tmp_path, slurm):
    job = slurm.sbatch(ONE, *training(mels, tmp_path / "out", "--max_train_steps=100000"),
                       options={"ntasks-per-node": 1}).start()  # fmt: skip
    job.wait_for(tmp_path / "out" / "checkpoint-10")
    status, output = job.cancel()
    assert status == 75 and "by SIGTERM" in output, output
    assert not job.requeued
    assert contents(tmp_path / "out" / f"checkpoint-{step_of(tmp_path / 'out')}")


def test_an_error_is_not_tried_again(mels, tmp_path, slurm):
    status, output = slurm.sbatch(ONE, *training("nowhere", tmp_path / "out"),
                                  options={"ntasks-per-node": 1}).start().end()  # fmt: skip
    assert status == 1 and "error: " in output
    assert not slurm.requeued.exists()


def test_an_array_of_jobs_makes_the_dataset_of_one_run(sounds, tmp_path, slurm, monkeypatch):
    from tonefield import audio_to_tokens

    words = [f"--input_dir={sounds}", "--codec=mulaw"]
    audio_to_tokens.main(audio_to_tokens.parse_args([*words, f"--output_dir={tmp_path / 'whole'}"]))
    monkeypatch.setenv("NUM_SHARDS", "2")
    for task in (1, 0, None):
        job = slurm.sbatch(BUILD, "audio_to_tokens.py", *words, f"--output_dir={tmp_path / 'out'}", task=task)
        status, output = job.start().end()
        assert status == 0, output

    def files(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert files(tmp_path / "out") == files(tmp_path / "whole")
