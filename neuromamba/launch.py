"""Start a training in as many processes as `compute` asks for.

Design choices
--------------
- The command starts itself again, by torchrun, in one process for each GPU of the node. So the same
  words do in a terminal, in a batch script and in the workflow; under a torchrun that someone has
  started already, they start nothing.
- For several nodes the command has to run in a SLURM job that has them. `srun` then starts a
  torchrun on each, and they meet on the node where the job's script runs.
- A signal to stop is passed on to all processes, which then have `PATIENCE` to write a checkpoint;
  torchrun by itself gives them 30 seconds.
- The exit status is that of the training. torchrun by itself would make it 1.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import NoReturn

from neuromamba.config import Compute
from neuromamba.files import InputError

PATIENCE = 600
"""Seconds that processes have to write a checkpoint (our choice); SLURM ends them when it wants."""

_MEETING = "NEUROMAMBA_RENDEZVOUS"


def start_processes(compute: Compute) -> None:
    """Go on in the processes that `compute` asks for; this returns in these alone.

    Raises
    ------
    InputError
        When it asks for several nodes outside of a SLURM job.
    SystemExit
        With the training's status, in the process that has started the others.
    """
    if "WORLD_SIZE" in os.environ or compute.processes * compute.nodes == 1:
        return
    command = [sys.executable, *sys.orig_argv[1:]]
    if compute.nodes > 1 and _MEETING not in os.environ:
        _start_on_every_node(compute.nodes, command)
    if threads := os.environ.get("OMP_NUM_THREADS"):
        # Those of the job, which its processes share.
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(threads) // compute.processes))
    raise SystemExit(_run_torchrun(compute, command))


def _start_on_every_node(nodes: int, command: list[str]) -> NoReturn:
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise InputError(
            f"compute.nodes is {nodes}, and this is no job of SLURM: start it by `snakemake "
            "--profile slurm`, set compute.nodes to 1, or start torchrun on every node yourself"
        )
    # Two jobs that share a node seldom differ by a multiple of 10,000.
    os.environ[_MEETING] = f"{socket.gethostname()}:{20_000 + int(job) % 10_000}"
    sys.stdout.flush()
    # Each torchrun may use all processors of the job on its node.
    where = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--cpu-bind=none"]
    os.execvp("srun", ["srun", *where, *command])


def _run_torchrun(compute: Compute, command: list[str]) -> int:
    """Run torchrun in this process, and return the training's exit status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from neuromamba.runtime import STOPPING, TRY_AGAIN

    signals = [*(one.name for one in STOPPING), "SIGINT", "SIGHUP", "SIGQUIT"]
    options = [f"--nproc-per-node={compute.processes}", "--no-python"]
    options += [f"--signals-to-handle={','.join(signals)}", f"--shutdown-timeout={PATIENCE}"]
    if compute.nodes > 1:
        meeting = os.environ[_MEETING]
        options += [f"--nnodes={compute.nodes}", "--rdzv-backend=c10d"]
        options += [f"--rdzv-endpoint={meeting}", f"--rdzv-id={meeting}"]
    else:
        options.append("--standalone")
    try:
        run(parse_args([*options, *command]))
    except SignalException as error:
        return TRY_AGAIN if error.sigval in STOPPING else 128 + error.sigval
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return status if status > 0 else 128 - status
    return 0
