#!/usr/bin/env bash
# Snakemake runs a copy of this in the new environment of neuromamba.yaml, from the working folder.
# The package is installed editable, so that jobs run the code that stands in the repository.
# Snakemake makes the environment anew when this file changes, and so when the pinned versions do:
# SHA-256 of constraints.txt: 9a4abe8246a204242bc76aa8c62882aa73e0fc652c1df2f9141be591af15f15f
set -euo pipefail
export PYTHONNOUSERSITE=1 # what lies in ~/.local is no part of the environment
make --directory "${NEUROMAMBA_SOURCE:?the workflow sets it to the repository}" install PYTHON=python
