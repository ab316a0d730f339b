"""NeuroMamba: from a BIDS folder to an evaluated fMRI foundation model."""

from importlib.metadata import version

__version__ = version("neuromamba")
