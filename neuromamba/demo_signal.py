r"""The demo's subjects and their BOLD signal, with known effects of sex, age and site.

The demo is there to be learnt from and to be fooled by; nothing in it is a finding about people.

A run is `T` volumes. All time courses below have zero mean and unit variance; `g`, `n`, `q` are
noise band-limited to 0.01-0.1 Hz, `e` is an AR(1) process with the
time constant `NOISE_SECONDS` and a spatial width of about `NODE_SPACING`, `w` is white. For voxel
`v` in parcel `p` of network `k`:

    u_p(t) = sqrt(c_k) n_k(t) + sqrt(1 - c_k) q_p(t)                      course of a parcel
    s_v(t) = sqrt(G) g(t) + sqrt(1 - G) [sqrt(S_k) u_p(t) + sqrt(1 - S_k) e_v(t)]
    x_v(t) = I m_v [1 + BOLD s_v(t) + W w_v(t) + drift_v(t) + motion_v(t)]

`c_k` is the coherence of the network (the correlation between its parcels' courses), `S_k` the
share of a voxel's BOLD variance that its parcel has in common. The variance of `s_v` is 1 whatever
`c`, `S` and `G` are: an effect on them changes connectivity, on the scale of parcels and within
them, and not the variance of single voxels.

Effects, with sex coded -1/2 (F) and +1/2 (M), age as (years - 50) / 30, and normal deviations
`z` of each subject and network:

    logit c_k = logit BASE_COHERENCE + SEX[k] sex + AGE[k] age + SUBJECT_SD z
    S_k       = BASE_SHARED + SHARED_SLOPE (c_k - BASE_COHERENCE)
    corr(n_A, n_B) = tanh(BASE_COUPLING + SEX_COUPLING sex + COUPLING_SD z)

Site sets the global-signal share `G`, the white noise `W` and the intensity scale `I`, and the
share of the sexes differs between sites. Drift is half a cosine over the run along one direction
of the brain. Volumes whose framewise displacement exceeds `SPIKE_THRESHOLD` carry a gradient
along another direction in proportion to the excess.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import signal

from neuromamba.demo_brain import NETWORKS, PARCELS, Brain

BOLD = 0.015
NOISE_SECONDS = 3.0
BASE_COHERENCE = 0.45
BASE_SHARED = 0.35
SHARED_SLOPE = 0.6
SUBJECT_SD = 0.35
SEX = {"A": 0.75, "B": 0.75, "D": 0.75}
AGE = {"C": -1.5, "E": -1.5}
BASE_COUPLING = 0.3
SEX_COUPLING = 0.4
COUPLING_SD = 0.15
DRIFT = 0.004
SPIKE_THRESHOLD = 0.4
SPIKE = 0.008
ANATOMY_SD = 0.03
BLOCK = 60


@dataclass(frozen=True)
class Site:
    """A scanner: global-signal share, white noise and intensity scale; its share of each sex."""

    global_share: float
    white_noise: float
    scale: float
    share_of_women: float
    share_of_men: float


SITES = {
    "amber": Site(0.08, 0.010, 0.8, 0.45, 0.25),
    "birch": Site(0.12, 0.013, 1.0, 0.35, 0.35),
    "cedar": Site(0.16, 0.017, 1.3, 0.20, 0.40),
}


@dataclass(frozen=True)
class Subject:
    """One synthetic participant."""

    name: str
    sex: str
    age: int
    site: str


@dataclass(frozen=True)
class Connectivity:
    """What a subject's effects come to: one value a network, and the coupling of A and B."""

    coherence: NDArray[np.float64]
    shared: NDArray[np.float64]
    coupling: float


def draw_subjects(count: int, seed: int) -> list[Subject]:
    """Subjects with balanced sexes, ages uniform in 20-80, and sites that differ in sex ratio.

    Shares are filled as quotas rather than drawn, so that small samples have them too.
    """
    rng = np.random.default_rng([seed, 0])
    sexes = rng.permutation(np.resize(["F", "M"], count))
    ages = rng.permutation(20 + 60 * (np.arange(count) + 0.5) / count).astype(int)
    sites = np.empty(count, dtype=object)
    for sex in ("F", "M"):
        who = rng.permutation(np.flatnonzero(sexes == sex))
        shares = [s.share_of_women if sex == "F" else s.share_of_men for s in SITES.values()]
        quantile = (np.arange(len(who)) + 0.5) / max(len(who), 1)
        sites[who] = np.array(list(SITES))[np.searchsorted(np.cumsum(shares)[:-1], quantile)]
    width = max(2, len(str(count)))
    return [
        Subject(f"sub-{i + 1:0{width}d}", str(sexes[i]), int(ages[i]), str(sites[i]))
        for i in range(count)
    ]


def draw_connectivity(subject: Subject, rng: np.random.Generator) -> Connectivity:
    """The subject's coherences and coupling: effects of sex and age plus its own deviations."""
    sex = 0.5 if subject.sex == "M" else -0.5
    age = (subject.age - 50) / 30
    logit = np.log(BASE_COHERENCE / (1 - BASE_COHERENCE)) + SUBJECT_SD * rng.standard_normal(
        len(NETWORKS)
    )
    logit += [SEX.get(k, 0.0) * sex + AGE.get(k, 0.0) * age for k in NETWORKS]
    coherence = 1 / (1 + np.exp(-logit))
    shared = np.clip(BASE_SHARED + SHARED_SLOPE * (coherence - BASE_COHERENCE), 0.02, 0.98)
    coupling = np.tanh(BASE_COUPLING + SEX_COUPLING * sex + COUPLING_SD * rng.standard_normal())
    return Connectivity(coherence, shared, float(coupling))


def draw_motion(volumes: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Motion parameters (volume, 6): translations in mm, rotations in rad.

    A slow random walk, a little jitter, and sudden moves in about 3 % of the volumes.
    """
    scale = np.array([0.012, 0.015, 0.02, 0.0003, 0.0002, 0.0002]) * rng.uniform(0.6, 1.8)
    steps = scale * rng.standard_normal((volumes, 6))
    sudden = rng.random(volumes) < 0.03
    steps[sudden] += 15 * scale * rng.standard_normal((int(sudden.sum()), 6))
    steps[0] = 0
    walk = np.cumsum(steps, axis=0)
    return walk + 0.3 * scale * rng.standard_normal((volumes, 6))


def framewise_displacement(motion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Power's framewise displacement (volume,) in mm on a 50 mm sphere; the first is NaN."""
    moved = np.abs(np.diff(motion, axis=0)) * [1, 1, 1, 50, 50, 50]
    return np.concatenate([[np.nan], moved.sum(axis=1)])


def band_limited(
    shape: tuple[int, int], repetition_time: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Standardised courses (volume, course) with flat power in 0.01-0.1 Hz and little outside."""
    volumes, courses = shape
    n = 2 * volumes + 64  # cut from a longer series, because the Fourier series is periodic
    frequency = np.fft.rfftfreq(n, repetition_time)
    frequency[0] = 1.0
    gain = 1 / np.sqrt((1 + (0.01 / frequency) ** 8) * (1 + (frequency / 0.1) ** 8))
    gain[0] = 0.0
    spectrum = np.fft.rfft(rng.standard_normal((n, courses)), axis=0) * gain[:, None]
    course = np.fft.irfft(spectrum, n, axis=0)[:volumes]
    course -= course.mean(axis=0)
    return course / course.std(axis=0)


def parcel_courses(
    connectivity: Connectivity,
    network: NDArray[np.intp],
    volumes: int,
    repetition_time: float,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """The courses `u` (volume, parcel) of one run."""
    n = band_limited((volumes, len(NETWORKS)), repetition_time, rng)
    q = band_limited((volumes, PARCELS), repetition_time, rng)
    r = connectivity.coupling
    n[:, 1] = r * n[:, 0] + np.sqrt(1 - r**2) * n[:, 1]
    c = connectivity.coherence[network]
    return np.sqrt(c) * n[:, network] + np.sqrt(1 - c) * q


@dataclass(frozen=True)
class Run:
    """Everything of one run that is small; `blocks` makes the voxels from it.

    Attributes
    ----------
    parcels : ndarray of float64, (volume, parcel)
        Courses `u`.
    global_course : ndarray of float64, (volume,)
    motion : ndarray of float64, (volume, 6)
    """

    brain: Brain
    site: Site
    connectivity: Connectivity
    repetition_time: float
    anatomy: NDArray[np.float32]
    parcels: NDArray[np.float64]
    global_course: NDArray[np.float64]
    motion: NDArray[np.float64]

    def blocks(self, rng: np.random.Generator) -> Iterator[NDArray[np.float32]]:
        """Yield the signal `x` as (volume, voxel), at most `BLOCK` volumes at a time."""
        brain, site = self.brain, self.site
        shared = self.connectivity.shared[brain.network]
        g = BOLD * np.sqrt(site.global_share) * self.global_course
        u = BOLD * np.sqrt((1 - site.global_share) * shared) * self.parcels
        e_scale = BOLD * np.sqrt((1 - site.global_share) * (1 - shared))[brain.parcel]
        u, e_scale = u.astype(np.float32), e_scale.astype(np.float32)
        gradients, courses = self._nuisance(rng)
        mean = site.scale * self.anatomy
        persistence = np.exp(-self.repetition_time / NOISE_SECONDS)
        state = persistence * rng.standard_normal((1, brain.smoother.shape[1]))
        for start in range(0, len(u), BLOCK):
            part = slice(start, start + BLOCK)
            count = len(u[part])
            innovation = rng.standard_normal((count, state.shape[1])) * np.sqrt(1 - persistence**2)
            nodes, state = signal.lfilter([1], [1, -persistence], innovation, axis=0, zi=state)
            x = (brain.smoother @ nodes.T.astype(np.float32)).T * e_scale
            x += u[part][:, brain.parcel]
            x += g[part, None].astype(np.float32)
            x += courses[part] @ gradients
            x += np.float32(site.white_noise) * rng.standard_normal(x.shape, dtype=np.float32)
            yield mean * (1 + x)

    def _nuisance(
        self, rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Gradients (2, voxel) over the brain and courses (volume, 2): drift and motion."""
        directions = rng.standard_normal((2, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        along = directions @ (self.brain.mm - self.brain.mm.mean(axis=0)).T
        along /= along.std(axis=1, keepdims=True)
        volumes = len(self.parcels)
        drift = DRIFT * np.cos(np.pi * (np.arange(volumes) + 0.5) / volumes)
        moved = np.nan_to_num(framewise_displacement(self.motion)) - SPIKE_THRESHOLD
        spikes = SPIKE * np.clip(moved, 0, 2)
        return along.astype(np.float32), np.stack([drift, spikes], axis=1).astype(np.float32)


def draw_anatomy(brain: Brain, rng: np.random.Generator) -> NDArray[np.float32]:
    """The subject's mean image (voxel,): 10000 x template, with a smooth variation of its own."""
    nodes = rng.standard_normal(brain.smoother.shape[1]).astype(np.float32)
    variation = (brain.smoother @ nodes).astype(np.float32)
    return 10000 * brain.intensity * (1 + ANATOMY_SD * variation)


def draw_run(
    brain: Brain,
    subject: Subject,
    connectivity: Connectivity,
    anatomy: NDArray[np.float32],
    volumes: int,
    repetition_time: float,
    rng: np.random.Generator,
) -> Run:
    """Draw the courses and the motion of one run."""
    return Run(
        brain=brain,
        site=SITES[subject.site],
        connectivity=connectivity,
        repetition_time=repetition_time,
        anatomy=anatomy,
        parcels=parcel_courses(connectivity, brain.network, volumes, repetition_time, rng),
        global_course=band_limited((volumes, 1), repetition_time, rng)[:, 0],
        motion=draw_motion(volumes, rng),
    )
