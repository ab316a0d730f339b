# An image with the package and nothing that a job does not need. From the repository's root:
#
#   docker build --tag neuromamba .
#   docker build --tag neuromamba --build-arg PIP_EXTRA_INDEX_URL=... .
#   docker build --tag neuromamba:cuda --build-arg TARGETS="install kernels" .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" neuromamba tokens --help
#
# The first has torch as pip finds it: for Linux on x86-64 the build for CUDA, which also runs where
# there is no GPU. The second names an index of torch's smaller builds for CPUs. The third adds
# mamba-ssm's kernels; run it with `--gpus all`. envs/neuromamba.def takes the same steps for Apptainer.
FROM python:3.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONNOUSERSITE=1

# The compiler is for torch.compile and Triton, which build kernels while a job runs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/neuromamba
COPY Makefile pyproject.toml README.md LICENSE ./
COPY envs envs
COPY neuromamba neuromamba

ARG TARGETS=install
ARG PIP_EXTRA_INDEX_URL=
RUN make ${TARGETS} \
    && chmod -R a+rX .

# The home is everybody's, because `--user` gives the process a number that has none.
RUN useradd --create-home neuromamba \
    && chmod 1777 /home/neuromamba
ENV HOME=/home/neuromamba USER=neuromamba
USER neuromamba
WORKDIR /work
ENTRYPOINT ["neuromamba"]
