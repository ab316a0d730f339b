"""The configuration of a run, shared by the workflow and the command line."""

from neuromamba.config.data import (
    Classification,
    Dataset,
    FilePatterns,
    Participants,
    Regression,
    Rois,
    Splits,
    Target,
    Tokens,
    Volumes,
)
from neuromamba.config.load import build_config, load_config, merge, save_config
from neuromamba.config.schema import (
    Compute,
    Config,
    Evaluate,
    Finetune,
    Forecast,
    Model,
    NeuroMamba,
    Optimiser,
    Pretrain,
    Scaling,
)

__all__ = [
    "Classification",
    "Compute",
    "Config",
    "Dataset",
    "Evaluate",
    "FilePatterns",
    "Finetune",
    "Forecast",
    "Model",
    "NeuroMamba",
    "Optimiser",
    "Participants",
    "Pretrain",
    "Regression",
    "Rois",
    "Scaling",
    "Splits",
    "Target",
    "Tokens",
    "Volumes",
    "build_config",
    "load_config",
    "merge",
    "save_config",
]
