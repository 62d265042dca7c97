"""How well sounds fit their captions."""

from typing import Any

import numpy as np

from tonefield.evaluation.clap import ClapEmbedding
from tonefield.evaluation.metrics import Comparison
from tonefield.evaluation.statistics import mean_interval


def clap_score(comparison: Comparison) -> dict[str, Any]:
    """
    The mean cosine of CLAP's embeddings of a sound and of its caption, neither clamped nor scaled.

    The embedding of a sound longer than one window is the mean of those of its windows, at length 1.
    """
    options, generated = comparison.options, comparison.generated
    whole = generated.root  # of a subset: one model and one table of texts serve all
    if "clap" not in whole.memo:
        model = ClapEmbedding.from_name(options.clap, options.device or "cpu")
        captions = sorted({sample.columns[options.caption_column] for sample in whole.samples})
        whole.memo["clap"] = model, dict(zip(captions, model.embed_texts(captions, options.batch_size), strict=True))
    model, texts = whole.memo["clap"]
    embedded = generated.embed(model, options.batch_size)
    sums = np.add.reduceat(np.asarray(embedded.rows, np.float64), embedded.starts[:-1])
    sounds = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    captions = np.stack([texts[sample.columns[options.caption_column]] for sample in generated.samples])
    cosines = (sounds * captions).sum(1)
    return {
        "value": float(cosines.mean()),
        "interval": mean_interval(cosines),
        "std": float(cosines.std()),
        "clips": [len(generated)],
        "model": model.name,
    }
