"""The configuration of a run, shared by the workflow and the command line."""

from neuromamba.config.data import (
    Ants,
    Denoise,
    Fmriprep,
    Preprocess,
    Qc,
    Rois,
    Splits,
    Template,
    Tokens,
    Volumes,
)
from neuromamba.config.dataset import (
    Classification,
    Dataset,
    FilePatterns,
    Participants,
    Regression,
    Series,
    State,
    Target,
)
from neuromamba.config.load import build_config, load_config, merge, save_config
from neuromamba.config.models import Lmae, Model, NeuroMamba, RoiModel, RoiTransformer
from neuromamba.config.schema import Compute, Config, Evaluate, Explain, Scaling
from neuromamba.config.training import Adapters, Finetune, Forecast, Optimiser, Pretrain

__all__ = [
    "Adapters",
    "Ants",
    "Classification",
    "Compute",
    "Config",
    "Dataset",
    "Denoise",
    "Evaluate",
    "Explain",
    "FilePatterns",
    "Finetune",
    "Fmriprep",
    "Forecast",
    "Lmae",
    "Model",
    "NeuroMamba",
    "Optimiser",
    "Participants",
    "Preprocess",
    "Pretrain",
    "Qc",
    "Regression",
    "RoiModel",
    "RoiTransformer",
    "Rois",
    "Scaling",
    "Series",
    "Splits",
    "State",
    "Target",
    "Template",
    "Tokens",
    "Volumes",
    "build_config",
    "load_config",
    "merge",
    "save_config",
]
