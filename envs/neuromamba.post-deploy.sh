#!/usr/bin/env bash
# Snakemake runs a copy of this in the new environment of neuromamba.yaml, from the working folder.
# The package is installed editable, so that jobs run the code that stands in the repository.
# Snakemake makes the environment anew when this file changes, and so when the pinned versions do:
# SHA-256 of constraints.txt: 52f933dbfc0ba211d245be6e0e89acade4b4a660ddfddb934ef7993274fb89b7
set -euo pipefail
export PYTHONNOUSERSITE=1 # what lies in ~/.local is no part of the environment
make --directory "${NEUROMAMBA_SOURCE:?the workflow sets it to the repository}" install PYTHON=python
