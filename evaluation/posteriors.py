"""What an audio classifier takes sounds for, and how that differs between a sound and the one it was made after."""

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForAudioClassification

from tonefield.evaluation.classifier import ClassifierLogits, is_sound_classifier
from tonefield.evaluation.embeddings import Embedding, fingerprint_of
from tonefield.evaluation.encoders import load_feature_extractor, load_pretrained
from tonefield.evaluation.metrics import Comparison, Options
from tonefield.evaluation.sets import EmbeddedSet, SampleSet
from tonefield.evaluation.statistics import mean_interval


class TransformersClassifier(Embedding):
    """The logits of an audio classifier of transformers (AST, wav2vec 2.0, ...) for each 10 s."""

    def __init__(self, weights: str, device: torch.device | str = "cpu"):
        self.extractor = load_feature_extractor(weights)
        self.model = load_pretrained(AutoModelForAudioClassification, weights).to(device)
        self.name, self.dim, self.device = f"classifier={weights}", self.model.config.num_labels, device
        self.labels = [self.model.config.id2label[index] for index in range(self.dim)]
        self.sampling_rate = self.extractor.sampling_rate
        self.window, self.least = 10 * self.sampling_rate, self.sampling_rate // 10

    def fingerprint(self) -> str:
        settings = self.extractor.to_dict()
        return fingerprint_of(self.model, "classifier", 1, {key: str(value) for key, value in settings.items()})

    def forward(self, pieces: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        inputs = self.extractor(list(pieces.cpu().numpy()), sampling_rate=self.sampling_rate, return_tensors="pt")
        name = self.model.main_input_name
        return list(self.model(inputs[name].to(self.device)).logits[:, None])


def load_posterior_model(name: str, device: torch.device | str) -> Embedding:
    """
    `cnn14=FILE`, a classifier that `evaluate.py train-classifier` has made, or an audio classifier of transformers, as
    an embedding whose rows are logits.
    """
    kind, _, file = name.partition("=")
    if kind == "cnn14" and file:
        from tonefield.evaluation.cnn14 import CNN14Classifier

        return CNN14Classifier(file, device)
    if is_sound_classifier(name):
        return ClassifierLogits(name, device)
    return TransformersClassifier(name, device)


def posterior_model(generated: SampleSet, options: Options) -> Embedding:
    """What `--classifier` names, loaded once for all metrics."""
    assert options.classifier is not None
    memo = generated.root.memo
    if "posteriors" not in memo:
        memo["posteriors"] = load_posterior_model(options.classifier, options.device or "cpu")
    return memo["posteriors"]


def log_posteriors(embedded: EmbeddedSet) -> np.ndarray:
    """The logarithm of the mean of the posteriors of a file's pieces: (files, classes)."""
    logits = np.asarray(embedded.rows, np.float64)
    logits = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    if (embedded.counts == 1).all():
        return logits
    return np.logaddexp.reduceat(logits, embedded.starts[:-1]) - np.log(embedded.counts)[:, None]


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats of each row of log-probabilities."""
    return (np.exp(p) * (p - q)).sum(1)


def kl(comparison: Comparison) -> list[dict[str, Any]]:
    """
    The mean divergence between the posteriors of a generated file and of the reference's file of the same name, in
    both directions, for both are in use under the one name.
    """
    assert comparison.reference is not None
    options, reference, generated = comparison.options, comparison.reference, comparison.generated
    model = posterior_model(generated, options)
    places = {sample.name: index for index, sample in enumerate(reference.samples)}
    common = [index for index, sample in enumerate(generated.samples) if sample.name in places]
    other = [places[generated.samples[index].name] for index in common]
    if not common:
        raise ValueError("no file of these has a name that is in the reference.")
    theirs = log_posteriors(reference.embed(model, options.batch_size).subset(other))
    ours = log_posteriors(generated.embed(model, options.batch_size).subset(common))
    warnings = []
    if len(common) < len(generated):
        warnings.append(f"{len(generated) - len(common)} files have no counterpart of the same name and are left out")
    return [
        {
            "metric": name,
            "value": float(values.mean()),
            "interval": mean_interval(values),
            "clips": [len(common)],
            "model": model.name,
            "warnings": warnings if name == "kl_ref_gen" else [],
        }
        for name, values in (("kl_ref_gen", divergence(theirs, ours)), ("kl_gen_ref", divergence(ours, theirs)))
    ]
