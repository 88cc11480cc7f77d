"""How far a weights file is from its source, by the numpy oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from model.reference import Reference
from weights.calibration.sample import softmax
from weights.sources import Source
from weights.store import WeightsFile


def kl(file: Path, source: Source) -> float:
    """KL(source || file), mean over some texts."""
    model = Reference.from_weights(WeightsFile.open(file), cache_dtype=np.float32)
    truth = Reference.from_source(source, cache_dtype=np.float32)
    found = []
    for text in np.random.default_rng(6).integers(0, source.config.vocab_size, (6, 40)):
        p, q = (softmax(m.logits(text).astype(np.float64)) for m in (truth, model))
        found.append(np.sum(p * (np.log(p) - np.log(q)), axis=-1).mean())
    return float(np.mean(found))
