"""Statistics of a model on a calibration text: what a quantizer needs to know beyond the weights.

tokens = sample_tokens(source, 32, 256)  # or read_windows(path, tokenizer.encode, 32, 256)
calibration = calibrate(source, tokens, work_dir)
calibration.matrix("model.layers.0.mlp.down_proj").hessian
"""

from weights.calibration.calibration import Calibration, calibrate
from weights.calibration.sample import sample_tokens
from weights.calibration.statistics import MatrixStatistics
from weights.calibration.text import read_windows

__all__ = ["Calibration", "MatrixStatistics", "calibrate", "read_windows", "sample_tokens"]
