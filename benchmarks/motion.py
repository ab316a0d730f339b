"""Head motion: our estimate beside `ants.motion_correction`, on one scan, in one run.

    python benchmarks/motion.py                       # a simulated scan whose motion is known
    python benchmarks/motion.py --bold bold.nii.gz    # any raw BOLD series

Both get the same series, in memory, and the same reference (`make_reference`, timed apart), and no
mask; both have one thread (`--threads`). Each side runs in a process of its own, ours before and
after ANTs. ANTs also resamples the series (linearly); that is timed apart and taken off.

Then the series is resampled by what each found, with the same cubic splines, and looked at in the
same brain mask: tSNR (mean / SD over time of a voxel, without detrending, median over the mask),
and how far both tools find every so many of the volumes from the reference still. A tool finds its
own work good, so both judge both. Where the motion is known (simulated), the error is how far a
point of the reference wanders through the head.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from common import RESULTS, head, in_process, loads, machine, peak_mb, seconds, write_results

from neuromamba.motion import (
    make_reference,
    motion_matrices,
    resample_volume,
    rotation_centre,
    track_motion,
)

PACKAGES = ("neuromamba", "antspyx", "numpy", "scipy")
SIDES = ("ours", "ants")
SIMULATED = (64, 76, 40), (3.0, 3.0, 3.3)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""ITK's x and y point the other way."""
RESAMPLED = 5
"""Times that a volume is resampled by ANTs, to tell what that takes."""


# --- The scan -------------------------------------------------------------------------------------


def simulate(folder: Path, n: int, seed: int) -> Path:
    """A scan of a head that drifts, trembles and twice jumps; its motion lies beside it."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    from moving_head import move_head, oblique, random_walk

    shape, voxel = SIMULATED
    true = random_walk(n, step=0.04, seed=seed)
    true[:, 1] += np.linspace(0, 1, n)
    true[n // 2 :] += [1.5, -1, 2, 0.02, -0.01, 0.015]
    true[n // 3] += [-3, 2, 4, -0.05, 0.04, 0.03]
    affine = oblique(voxel, shape)
    volumes = move_head(true, affine, shape, tsnr=60, seed=seed)
    path = folder / "bold.nii.gz"
    image = nibabel.Nifti1Image(np.moveaxis(volumes, 0, -1).round().astype(np.int16), affine)
    nibabel.save(image, path)
    np.save(folder / "true.npy", motion_matrices(true, rotation_centre(shape, affine)))
    return path


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(t, x, y, z) values and the affine."""
    image = nibabel.load(path)
    return np.moveaxis(np.asarray(image.dataobj), -1, 0), image.affine


# --- Each side in a process of its own ------------------------------------------------------------


def run_side(side: str, bold: Path, folder: Path) -> dict[str, Any]:
    got = in_process(__file__, "--side", side, "--folder", str(folder), "--bold", str(bold))
    if "failed" in got:
        raise SystemExit(f"{side}: {got['failed']}")
    return got


def clocked(function: Any) -> tuple[Any, dict[str, Any]]:
    start, start_cpu = time.perf_counter(), time.process_time()
    value = function()
    return value, {
        "seconds": [time.perf_counter() - start],
        "cpu_seconds": [time.process_time() - start_cpu],
        "load": [os.getloadavg()[0]],
        "peak_mb": peak_mb(),
    }


def run_ours(bold: Path, folder: Path) -> dict[str, Any]:
    volumes, affine = read(bold)
    reference = nibabel.load(folder / "reference.nii.gz").get_fdata(dtype=np.float32)
    motion, measured = clocked(lambda: track_motion(volumes, reference, affine))
    centre = rotation_centre(reference.shape, affine)
    np.save(folder / "ours.npy", motion_matrices(motion.parameters, centre))
    return measured | {"unaligned": len(motion.unaligned)}


def run_ants(bold: Path, folder: Path) -> dict[str, Any]:
    import ants

    fixed = ants.image_read(str(folder / "reference.nii.gz"))
    image = ants.image_read(str(bold))
    n = image.shape[3]
    found, measured = clocked(lambda: ants.motion_correction(image, fixed=fixed))
    transforms = found["motion_parameters"]
    np.save(folder / "ants.npy", np.stack([_matrix(files[0]) for files in transforms]))
    moving = ants.slice_image(image, axis=3, idx=n - 1)

    def resample() -> None:
        for _ in range(RESAMPLED):
            ants.apply_transforms(fixed, moving, transforms[-1])

    _, of_resampling = clocked(resample)
    for clock in ("seconds", "cpu_seconds"):
        measured[clock][0] -= of_resampling[clock][0] / RESAMPLED * n
    return measured | {"resampling_seconds": of_resampling["seconds"][0] / RESAMPLED * n}


def _matrix(file: str) -> np.ndarray:
    """(4, 4) mm of the fixed to mm of the moving image, from an ITK transform of points."""
    import ants

    transform = ants.read_transform(file)
    corners = [[0.0, 0.0, 0.0], *np.eye(3).tolist()]
    moved = np.array([transform.apply_to_point(point) for point in corners])
    matrix = np.eye(4)
    matrix[:3, :3] = (moved[1:] - moved[0]).T
    matrix[:3, 3] = moved[0]
    return LPS @ matrix @ LPS


# --- How good -------------------------------------------------------------------------------------


def correct(bold: Path, matrices: np.ndarray) -> np.ndarray:
    """(t, x, y, z) float32 without the motion."""
    volumes, affine = read(bold)
    pairs = zip(volumes, matrices, strict=True)
    return np.stack([resample_volume(v.astype(np.float32), m, affine) for v, m in pairs])


def median_tsnr(series: np.ndarray, mask: np.ndarray) -> float:
    values = series[:, mask].astype(np.float64)
    sd = values.std(axis=0)
    return float(np.median(values.mean(axis=0)[sd > 0] / sd[sd > 0]))


def sphere(centre: np.ndarray) -> np.ndarray:
    """(4, 6) homogeneous points at 50 mm from the centre."""
    points = np.concatenate([centre + 50 * np.eye(3), centre - 50 * np.eye(3)])
    return np.concatenate([points, np.ones((6, 1))], axis=1).T


def wandering(found: np.ndarray, true: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(t,) mm from where points of the reference usually are in the head."""
    in_head = (np.linalg.inv(true) @ found @ points)[:, :3]
    return np.linalg.norm(in_head - np.median(in_head, axis=0), axis=1).mean(axis=1)


def remaining(folder: Path, series: np.ndarray, affine: np.ndarray, judge: str) -> float:
    """Mean mm that `judge` finds a corrected series from the reference."""
    path = folder / "corrected.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.moveaxis(series, 0, -1), affine), path)
    run_side(judge, path, folder)
    points = sphere(rotation_centre(series.shape[1:], affine))
    moved = np.load(folder / f"{judge}.npy") @ points - points
    return float(np.linalg.norm(moved[:, :3], axis=1).mean())


def judge_all(
    bold: Path, folder: Path, mask: np.ndarray, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    volumes, affine = read(bold)
    found = {side: np.load(folder / f"{side}.npy") for side in SIDES}
    points = sphere(rotation_centre(mask.shape, affine))
    quality: dict[str, dict[str, Any]] = {"before": {"tsnr": median_tsnr(volumes, mask)}}
    apart = ((found["ours"] - found["ants"]) @ points)[:, :3]
    quality["before"]["sides_apart_mm"] = float(np.linalg.norm(apart, axis=1).mean())
    for side, matrices in found.items():
        print(f"judging {side}", file=sys.stderr, flush=True)
        series = correct(bold, matrices)
        quality[side] = {"tsnr": median_tsnr(series, mask)}
        steps = np.linalg.norm(np.diff(matrices @ points, axis=0)[:, :3], axis=1)
        quality[side]["mean_step_mm"] = float(steps.mean())
        for judge in SIDES:
            left = remaining(folder, series[:: options.judge_every], affine, judge)
            quality[side][f"left_by_{judge}_mm"] = left
        if (folder / "true.npy").exists():
            wrong = wandering(matrices, np.load(folder / "true.npy"), points)
            quality[side] |= {"error_mm": float(wrong.mean()), "worst_mm": float(wrong.max())}
    return quality


def measure(bold: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from nilearn.masking import compute_epi_mask

    result: dict[str, Any] = {"machine": machine(*PACKAGES), "threads": options.threads}
    result["judge_every"] = options.judge_every
    volumes, affine = read(bold)
    result |= {"shape": volumes.shape[1:], "volumes": len(volumes), "simulated": not options.bold}
    reference, of_reference = clocked(lambda: make_reference(volumes, affine))
    result["reference"] = of_reference
    nibabel.save(nibabel.Nifti1Image(reference, affine), folder / "reference.nii.gz")
    mean = volumes.mean(axis=0, dtype=np.float64).astype(np.float32)
    mask = np.asarray(compute_epi_mask(nibabel.Nifti1Image(mean, affine)).dataobj) > 0
    result["mask_voxels"] = int(mask.sum())
    sides: dict[str, Any] = {}
    for side in ("ours", "ants", "ours"):
        print(side, file=sys.stderr, flush=True)
        got = run_side(side, bold, folder)
        old = sides.setdefault(side, got)
        if old is not got:
            for clock in ("seconds", "cpu_seconds", "load"):
                old[clock] += got[clock]
    result["sides"] = sides
    result["quality"] = judge_all(bold, folder, mask, options)
    return result


# --- Report ---------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown, losses included."""
    sides, quality, n = result["sides"], result["quality"], result["volumes"]
    ours, ants = (sides[side] for side in SIDES)
    scan = "simulated scan" if result["simulated"] else "real scan"
    shape = " x ".join(map(str, result["shape"]))
    rows = [
        head(result["machine"], PACKAGES),
        "",
        f"A {scan} of {shape} voxels and {n} volumes; {result['threads']} thread(s); {loads(sides)}"
        f"; brain mask of {result['mask_voxels']} voxels.",
        "",
        "| what | ours | ANTs | ANTs / ours |",
        "|---|---|---|---|",
    ]
    for name, clock in (("time", "seconds"), ("processor time", "cpu_seconds")):
        a, b = seconds(ours, clock), seconds(ants, clock)
        rows.append(f"| {name}, s | {a:.2f} | {b:.1f} | {b / a:.0f} |")
    lines = {
        "tsnr": "tSNR afterwards",
        "mean_step_mm": "mean motion from volume to volume, mm",
        "left_by_ours_mm": "motion left, as found by ours, mm",
        "left_by_ants_mm": "motion left, as found by ANTs, mm",
        "error_mm": "mean error, mm",
        "worst_mm": "largest error, mm",
    }
    for key, name in lines.items():
        if key in quality["ours"]:
            a, b = (quality[side][key] for side in SIDES)
            rows.append(f"| {name} | {a:.3f} | {b:.3f} | {b / a:.3f} |")
    return "\n".join(
        [
            *rows,
            "",
            f"tSNR before: {quality['before']['tsnr']:.3f}. The two estimates are "
            f"{quality['before']['sides_apart_mm']:.3f} mm apart (mean, points at 50 mm from the "
            f"centre). Not in these times: the reference, that both use "
            f"({seconds(result['reference']):.1f} s), and ANTs' resampling "
            f"({ants['resampling_seconds']:.1f} s). Ours flagged {ours['unaligned']} volumes as "
            "not aligned.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bold", type=Path, help="a raw BOLD series; default: simulate one")
    parser.add_argument("--volumes", type=int, default=24, help="of the simulated scan")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--judge-every", type=int, default=6, help="leaves two or more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run = run_ours if options.side == "ours" else run_ants
        print(json.dumps(run(options.bold, options.folder)))
        return
    for name in ("OMP", "OPENBLAS", "MKL", "ITK_GLOBAL_DEFAULT"):
        end = "NUMBER_OF_THREADS" if name.startswith("ITK") else "NUM_THREADS"
        os.environ[f"{name}_{end}"] = str(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TMPDIR"] = name  # where ANTs leaves its transforms
        bold = options.bold or simulate(folder, options.volumes, options.seed)
        result = measure(bold, folder, options)
    text = table(result)
    print(text)
    scan = "real" if options.bold else "simulated"
    write_results(options.results, "motion", result, text, f"{scan}-scan")


if __name__ == "__main__":
    main()
