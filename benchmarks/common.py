"""What the benchmarks share: processes, clocks, memory, tensors to compare, and result files.

Every side of a comparison runs in a process of its own, started anew for each round, so that no
side inherits another's memory, threads or imports, and so that a change of load on the machine
during the run meets all sides alike.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


# --- Processes ------------------------------------------------------------------------------------


def in_process(script: str, *arguments: str) -> dict[str, Any]:
    """Run a benchmark's script once more and read the JSON of its last line.

    A side that cannot run gives `{"failed": why}`.
    """
    command = [sys.executable, script, *arguments]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    if result.returncode != 0:
        return {"failed": lines[-1] if lines else f"it ended with status {result.returncode}"}
    return json.loads(lines[-1])


def rounds(
    sides: Sequence[str], n: int, run: Callable[[str, bool], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Run all sides in turn, `n` times, and pool what each measured.

    `run(side, first)` is told which round is the first, the only one whose tensors are compared.
    The times of all rounds are kept, of memory the largest.
    """
    pooled: dict[str, dict[str, Any]] = {}
    for index in range(n):
        for side in sides:
            if "failed" in pooled.get(side, {}):
                continue
            print(f"round {index + 1} of {n}: {side}", file=sys.stderr, flush=True)
            got = run(side, index == 0)
            if "failed" in got:
                print(f"  {got['failed']}", file=sys.stderr, flush=True)
            old = pooled.setdefault(side, got)
            if old is not got:
                for what in ("seconds", "cpu_seconds", "load"):
                    old[what] += got[what]
                old["peak_mb"] = max(old["peak_mb"], got["peak_mb"])
    return pooled


def seconds(side: Mapping[str, Any], clock: str = "seconds") -> float:
    """The median time of a side; by the clock `cpu_seconds`, what it had of the processor.

    The latter says more where other work runs on the same cores.
    """
    return float(np.median(side[clock]))


def loads(sides: Mapping[str, Mapping[str, Any]]) -> str:
    """How loaded the machine was meanwhile; the side that runs is about as many as its threads."""
    every = [load for side in sides.values() for load in side.get("load", [])]
    return f"load {min(every):.1f} to {max(every):.1f}" if every else "load unknown"


def run_command(
    command: Sequence[str | Path], log: Path, cwd: Path | None = None
) -> dict[str, float]:
    """Run a command with one thread for the numerical libraries; its output goes to `log`.

    Wall and processor seconds (of its children too), and peak memory of its own process. What
    `wait4` tells of memory would start at this process's size, so it is looked up while it runs.
    """
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    peak = 0.0
    with log.open("wb") as stream:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=cwd, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **limits}
        )
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            peak = max(peak, _peak_of(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}:\n{log.read_text()[-4000:]}")
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": peak,
        "load": os.getloadavg()[0],
    }


def _peak_of(process: int) -> float:
    """Peak resident memory of another process so far; 0 once it has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    sizes = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(sizes[0]) / 1024 if sizes else 0.0


# --- Other people's code --------------------------------------------------------------------------


def package_without_init(name: str, path: str | None = None) -> ModuleType:
    """Make a package known without running its `__init__`, so that its parts can be imported alone.

    Some packages import at their top what the part in question does not need. `path` is the folder
    that holds the package, if it is not installed.
    """
    if path:
        sys.path.insert(0, path)
    spec = find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"no package {name}" + (f" in {path}" if path else ""))
    sys.modules[name] = module_from_spec(spec)
    return sys.modules[name]


# --- Clocks and memory ----------------------------------------------------------------------------


def peak_mb() -> float:
    """Peak resident memory of this process, since the last `reset_peak` if there was one."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would start at the parent's size.
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak() -> None:
    """Let the peak start anew from what is resident now, where the system can (Linux)."""
    switch = Path("/proc/self/clear_refs")
    if switch.exists():
        switch.write_text("5")


def median_ms(function: Callable[[int], Any], arguments: list[int]) -> float:
    function(arguments[0])
    times = []
    for argument in arguments:
        start = time.perf_counter()
        function(argument)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


def measure(step: Callable[[], Any], device: str, repeats: int) -> dict[str, Any]:
    """Time `step`, after one call that is not timed, and its peak memory above what is held now.

    On a CPU the memory is that of the process (resident pages), so what the allocator keeps for
    later counts; on a GPU it is what torch allocated.
    """
    import torch

    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() / 2**20
    else:
        reset_peak()
        held = peak_mb()
    times, cpu = [], []
    for _ in range(repeats + 1):
        start, start_cpu = time.perf_counter(), time.process_time()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_mb()
    times, cpu = times[1:] or times, cpu[1:] or cpu
    load = [os.getloadavg()[0]]
    return {"seconds": times, "cpu_seconds": cpu, "peak_mb": peak - held, "load": load}


# --- Same numbers ---------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors for the parent to compare, in float64."""
    arrays = {name: value.detach().double().cpu().numpy() for name, value in tensors.items()}
    np.savez(path, **arrays)


def differences(path: Path, reference: Path) -> dict[str, float]:
    """Largest difference of each tensor, over the largest value of the reference."""
    with np.load(path) as ours, np.load(reference) as theirs:
        return {
            name: float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max())
            for name in theirs.files
        }


def norm_of_difference(path: Path, reference: Path) -> float:
    """Norm of the difference of all tensors together, over the norm of the reference."""
    with np.load(path) as ours, np.load(reference) as theirs:
        wrong = sum(float(np.square(ours[name] - theirs[name]).sum()) for name in theirs.files)
        whole = sum(float(np.square(theirs[name]).sum()) for name in theirs.files)
    return float(np.sqrt(wrong / whole))


# --- Result files ---------------------------------------------------------------------------------


def machine(*packages: str, device: str = "cpu") -> dict[str, Any]:
    """Date, processor, load and versions, for the head of a result."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "gpu": gpu_name() if device.startswith("cuda") else None,
        "load_average_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: installed(name) for name in packages},
    }


def gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def head(host: Mapping[str, Any], packages: Sequence[str]) -> str:
    """The first line of a result."""
    where = [host["date"], host["processor"], f"{host['cores']} cores"]
    where += [host["gpu"]] if host["gpu"] else []
    where += [f"load {host['load_average_at_start']:.1f} at the start"]
    versions = [f"{name} {host[name] or 'not installed'}" for name in packages]
    return f"{', '.join(where)}; {', '.join(versions)}."


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_results(folder: Path, name: str, result: dict[str, Any], text: str, *more: str) -> None:
    """Write `{name}_{date}_{processor}[_{gpu}][_{more}]` as `.json` and `.md`."""
    host = result["machine"]
    parts = [name, host["date"], host["processor"], *([host["gpu"]] if host["gpu"] else []), *more]
    stem = folder / re.sub(r"[^\w.-]+", "-", "_".join(parts).replace("(R)", ""))
    folder.mkdir(parents=True, exist_ok=True)
    stem.with_name(stem.name + ".json").write_text(json.dumps(result, indent=2) + "\n")
    stem.with_name(stem.name + ".md").write_text(text + "\n")
