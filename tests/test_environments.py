"""The environments that jobs can run in: conda, containers, and how Snakemake puts jobs into them.

No container engine and no conda is needed. Snakemake is the real one, and meets stand-ins of
`apptainer` and `conda` that record how they are called and run the job in a plain folder. The
install steps of the images run in a virtual environment.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from spython.main.parse.parsers import SingularityParser
from spython.main.parse.recipe import Recipe

from neuromamba.demo import write_demo

APPTAINER = """#!/bin/sh
if [ "$1" = --version ]; then echo "apptainer version 1.3.4"; exit; fi
printf '%s\\n' "$*" >> {record}
while [ "$1" != bash ]; do shift; done
PATH={image}:/usr/bin:/bin # a container has its own
exec "$@"
"""
CONDA = """#!/bin/sh
case "$*" in
    --version) echo "conda 25.1.1" ;;
    "info --json") echo '{{"conda_prefix": "{conda}", "platform": "linux-64"}}' ;;
    "config --get"*) echo '{{"get": {{"channel_priority": "strict"}}}}' ;;
    "env create"*)
        echo "$*" >> {record}
        while [ "$1" != --file ]; do shift; done
        cp "$2" {conda}/asked.yaml
        mkdir -p "$4" && cp -r {image} "$4/bin" ;;
    "clean "*) ;;
    *) echo "conda $*: not expected" >&2; exit 1 ;;
esac
"""
ACTIVATE = 'export PATH="$1/bin:$PATH" CONDA_PREFIX="$1"\n'
# What an environment holds: the real command, and a `python` that tells what it would install.
COMMAND = '#!/bin/sh\necho "$0 $*" >> {record}\nexec {real} "$@"\n'
PYTHON = '#!/bin/sh\necho "python $* in $PWD" >> {record}\n'


# --- What the files say -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def docker(root: Path) -> list[tuple[str, str]]:
    """The instructions of the Dockerfile with their values."""
    with (root / "Dockerfile").open("rb") as file:
        found = DockerfileParser(fileobj=file).structure
    return [(one["instruction"], one["value"]) for one in found if one["instruction"] != "COMMENT"]


@pytest.fixture(scope="module")
def apptainer(root: Path) -> Recipe:
    """The definition of the image for Apptainer."""
    (recipe,) = SingularityParser(str(root / "envs" / "neuromamba.def")).recipe.values()
    return recipe


def values(docker: list[tuple[str, str]], instruction: str) -> list[str]:
    return [value for name, value in docker if name == instruction]


def steps(docker: list[tuple[str, str]]) -> list[str]:
    """The commands of all RUN instructions, one by one."""
    return [step.strip() for run in values(docker, "RUN") for step in run.split("&&")]


def test_the_docker_image_runs_the_command_and_not_as_root(docker: list[tuple[str, str]]):
    assert [json.loads(value) for value in values(docker, "ENTRYPOINT")] == [["neuromamba"]]
    user = values(docker, "USER")[-1]
    assert f"useradd --create-home {user}" in steps(docker)


def test_the_docker_image_copies_what_exists_and_is_not_ignored(
    docker: list[tuple[str, str]], root: Path
):
    sources = [source for copy in values(docker, "COPY") for source in copy.split()[:-1]]
    ignored = (root / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == set(sources)
    assert all((root / source).exists() for source in sources)


def test_the_apptainer_image_is_the_docker_image(
    docker: list[tuple[str, str]], apptainer: Recipe, root: Path
):
    assert [apptainer.fromHeader] == values(docker, "FROM")
    home = values(docker, "WORKDIR")[0]
    copied = [source for copy in values(docker, "COPY") for source in copy.split()[:-1]]
    assert apptainer.files == [f"{source} {home}/{source}" for source in copied]
    post = apptainer.install[: apptainer.install.index("chmod -R a+rX .") + 1]
    assert post.pop(0) == f"export {values(docker, 'ENV')[0]}"
    post.remove(f"cd {home}")
    without_user = [step for step in steps(docker) if "/home/neuromamba" not in step]
    without_user = [step for step in without_user if not step.startswith("useradd")]
    assert [step.replace("{{ TARGETS }}", "${TARGETS}") for step in post] == without_user
    assert f"# {values(docker, 'ARG')[0]}" in apptainer.comments
    assert apptainer.cmd == 'exec neuromamba "$@"'


def test_all_environments_have_the_same_python(docker: list[tuple[str, str]], root: Path):
    wanted = yaml.safe_load((root / "envs" / "neuromamba.yaml").read_text())["dependencies"]
    (python,) = (one.split("=")[1] for one in wanted if one.startswith("python "))
    assert values(docker, "FROM")[0].startswith(f"python:{python}-")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert python in SpecifierSet(project["requires-python"])
    assert {"pip", "make"} < set(wanted)


def test_new_pins_make_the_conda_environment_anew(root: Path):
    """Snakemake looks at the two files of the environment alone, so one must name the pins."""
    digest = hashlib.sha256((root / "envs" / "constraints.txt").read_bytes()).hexdigest()
    assert digest in (root / "envs" / "neuromamba.post-deploy.sh").read_text(), (
        f"constraints.txt has changed: write its digest {digest} into neuromamba.post-deploy.sh"
    )


def test_every_rule_that_runs_a_command_names_the_conda_environment(root: Path):
    rules = [
        rule
        for file in (root / "workflow" / "rules").glob("*.smk")
        for rule in re.split(r"^(?=rule )", file.read_text(), flags=re.MULTILINE)[1:]
        if "shell:" in rule
    ]
    assert len(rules) > 10
    missing = [rule.split(":")[0] for rule in rules if '"../../envs/neuromamba.yaml"' not in rule]
    assert not missing


def test_the_repository_is_what_the_workflow_catalog_asks_for(root: Path):
    """Its page on adding workflows lists these conditions for `standardized usage`."""
    words = (root / "README.md").read_text().lower()
    assert "snakemake" in words
    assert "workflow" in words
    assert (root / "workflow" / "Snakefile").is_file()
    assert (root / "config" / "README.md").is_file()
    assert list((root / "workflow" / "rules").glob("*.smk"))
    usage = yaml.safe_load((root / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert usage["report"] is True
    assert set(usage["mandatory-flags"]) == {"desc", "flags"}
    methods = {"conda": True, "apptainer": True, "apptainer+conda": False, "report": True}
    assert usage["software-stack-deployment"] == methods


# --- Snakemake, with stand-ins ------------------------------------------------------------------


@pytest.fixture
def folder(root: Path, tmp_path: Path) -> Path:
    """A working folder with four scans, and `tools` to put on PATH."""
    shutil.copytree(root / "config", tmp_path / "config")
    shutil.copy(root / "tests" / "tiny.yaml", tmp_path / "tiny.yaml")
    shutil.copy(root / "tests" / "tiny-model.yaml", tmp_path / "config" / "models" / "tiny.yaml")
    write_demo(tmp_path / "data" / "tiny", subjects=4, volumes=24, voxel_size=8.0, seed=0)
    conda, image, tools = (tmp_path / name for name in ("conda", "image", "tools"))
    names = {"record": tmp_path / "record", "image": image, "conda": conda}
    names["real"] = Path(sys.executable).with_name("neuromamba")
    scripts = {
        tools / "apptainer": APPTAINER,
        tools / "conda": CONDA,
        conda / "bin" / "activate": ACTIVATE,
        image / "neuromamba": COMMAND,
        image / "python": PYTHON,
    }
    for path, text in scripts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(**names))
        path.chmod(0o755)
    names["record"].touch()
    return tmp_path


def index(folder: Path, root: Path, *options: str) -> list[str]:
    """Run `snakemake index` to its end; the new lines of the record."""
    command = [sys.executable, "-m", "snakemake", "index", "--snakefile", str(root / "Snakefile")]
    command += ["--cores", "1", "--configfile", "tiny.yaml", "--forceall", *options]
    path = os.pathsep.join([str(folder / "tools"), os.environ["PATH"]])
    record = folder / "record"
    old = len(record.read_text().splitlines())
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "results" / "tiny" / "index.tsv").exists()
    return record.read_text().splitlines()[old:]


@pytest.mark.slow
def test_without_a_deployment_method_jobs_run_as_they_are(folder: Path, root: Path):
    assert index(folder, root) == []


@pytest.mark.slow
def test_jobs_run_in_the_image_of_the_config(folder: Path, root: Path):
    called, *ran = index(
        *(folder, root, "--config", "compute={container: images/brain.sif}"),
        *("--sdm", "apptainer", "--apptainer-args", "--nv --bind /data"),
    )
    before, _, command = called.partition(" bash -c ")
    assert before.startswith(f"exec --home {folder} --nv --bind /data ")
    assert before.endswith(" images/brain.sif")
    assert "neuromamba index" in command
    assert ran
    assert all(line.startswith(f"{folder}/image/neuromamba index") for line in ran)


@pytest.mark.slow
def test_jobs_run_in_a_conda_environment_that_is_made_once(folder: Path, root: Path):
    created, installed, *ran = index(folder, root, "--sdm", "conda")
    assert created.startswith("env create ")
    asked = (folder / "conda" / "asked.yaml").read_text()
    assert asked == (root / "envs" / "neuromamba.yaml").read_text()
    options = "--constraint envs/constraints.txt --editable .[ants]"
    assert installed == f"python -m pip install {options} in {root}"
    environment = created.split()[-1]
    assert ran
    assert all(line.startswith(f"{environment}/bin/neuromamba index") for line in ran)
    assert index(folder, root, "--sdm", "conda") == ran


# --- The install steps, for real ----------------------------------------------------------------


@pytest.mark.slow
def test_the_install_steps_of_the_image_give_a_package_that_runs(
    docker: list[tuple[str, str]], root: Path, tmp_path: Path
):
    """Half a minute where pip has the packages in its cache. Only what needs root is left out."""
    context, environment = tmp_path / "context", tmp_path / "environment"
    context.mkdir()
    for source in (source for copy in values(docker, "COPY") for source in copy.split()[:-1]):
        if (root / source).is_dir():
            shutil.copytree(root / source, context / source)
        else:
            shutil.copy(root / source, context / source)
    venv.create(environment, with_pip=True, symlinks=True)
    # `make test` would pass its own settings on to the make of the image.
    variables = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "PYTHON")}
    variables["PATH"] = f"{environment}/bin{os.pathsep}{os.environ['PATH']}"
    variables["PIP_NO_COMPILE"] = "1"  # it runs once
    variables |= dict(one.split("=", 1) for one in values(docker, "ARG") if not one.endswith("="))
    of_root = ("apt-get ", "rm -rf /var/", "useradd ", "chmod 1777 ")
    left = [step for step in steps(docker) if not step.startswith(of_root)]
    assert left[0] == "make ${TARGETS}"
    subprocess.run(
        ["sh", "-ec", "\n".join(left)], cwd=context, env=variables, check=True, timeout=500
    )
    done = subprocess.run(
        ["neuromamba", "--version"], env=variables, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"neuromamba \d+\.\d+\.\d+\n", done.stdout)
    listed = subprocess.run(
        [f"{environment}/bin/python", "-m", "pip", "list", "--format", "json"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (root / "envs" / "constraints.txt").read_text().splitlines()
    pinned = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines)
    }
    for package in json.loads(listed.stdout):
        name = canonicalize_name(package["name"])
        if name not in ("neuromamba", "pip"):
            assert package["version"].split("+")[0] == pinned.get(name), f"{name} is not as pinned"
