"""Imported once, by the process that the runs of `fault_runs.py` fork from: what scripts import while they run."""

import importlib

import torch  # noqa: F401


for name in (
    "matplotlib.pyplot", "scipy.stats", "tonefield.data.building", "tonefield.data.loudness",
    "tonefield.data.mel_converter", "tonefield.data.pictures", "tonefield.data.token_converter",
    "tonefield.evaluation.metrics", "tonefield.evaluation.report", "tonefield.evaluation.sets",
    "tonefield.pipelines.pipeline_mel_pfgm", "tonefield.pipelines.pipeline_sedd_token",
    "tonefield.training.autoencoder", "tonefield.training.latents", "tonefield.training.lora",
    "tonefield.training.loop", "tonefield.training.pretrained", "tonefield.training.recordings",
    "tonefield.training.text", "tonefield.training.token_data", "tonefield.training.validation",
):  # fmt: skip
    importlib.import_module(name)
