"""The files for containers: the commands that they run exist, and their assumptions hold."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"

pytestmark = pytest.mark.skipif(
    not DEPLOY.exists(), reason="the package under test is installed without its sources"
)


def options_of(command: str) -> set[str]:
    """Every option of a command, by the generated reference."""
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    section = re.split(r"\n## `admtrt ", text.partition(f"\n## `admtrt {command}`")[2])[0]
    return set(re.findall(r"--[a-z][a-z-]*", section))


def check(words: list[str], command: str) -> None:
    known = options_of(command)
    assert known
    for word in words:
        if word.startswith("--"):
            assert word in known, f"{command} has no {word}"


def instructions(name: str) -> dict[str, list[str]]:
    """Of a Dockerfile, by name."""
    text = (DEPLOY / name).read_text(encoding="utf-8").replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            word, _, rest = line.strip().partition(" ")
            found.setdefault(word, []).append(rest)
    return found


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_dockerfiles_run_what_there_is(name: str) -> None:
    made = instructions(name)
    (entry,) = made["ENTRYPOINT"]
    words = re.findall(r'"([^"]*)"', entry)
    assert words[:2] == ["/opt/venv/bin/admtrt", "serve"]
    check(words, "serve")
    assert made["USER"] == ["10001"]  # Kubernetes can see that it is not root
    assert made["STOPSIGNAL"] == ["SIGTERM"]
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    (install,) = (run for run in made["RUN"] if "pip install" in run)
    (asked,) = re.findall(r'"\.\[(.*?)\]"', install)
    assert set(asked.split(",")) <= extras
    for copied in made["COPY"]:
        *sources, _ = shlex.split(copied)
        assert all((ROOT / source).exists() for source in sources)


def test_dockerfiles_are_clean() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("hadolint is not installed")
    files = [DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cuda"]
    done = subprocess.run([linter, *files], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


def pods(value: Any) -> list[dict[str, Any]]:
    """Every container of a document."""
    if isinstance(value, dict):
        own = [one for one in value.get("containers", []) if isinstance(one, dict)]
        return own + [pod for each in value.values() for pod in pods(each)]
    return [pod for each in value for pod in pods(each)] if isinstance(value, list) else []


def test_the_kubernetes_example_agrees_with_the_server() -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
    deployment, service = documents
    (container,) = pods(deployment)
    arguments = container["args"]
    check(arguments, "serve")
    spec = deployment["spec"]["template"]["spec"]
    seconds = {
        name: float(arguments[arguments.index(name) + 1]) for name in ("--drain-grace", "--drain-timeout")
    }
    assert spec["terminationGracePeriodSeconds"] > sum(seconds.values())
    paths = {
        container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert paths == {"/health/ready", "/health/live"}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    assert service["metadata"]["name"] in arguments  # as clients in the cluster call it


def test_the_ray_example_samples() -> None:
    job = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text(encoding="utf-8"))
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[1] == "sample"
    check(words, "sample")
    assert "--ray" in words
    mounts = {tuple(sorted(one["mountPath"] for one in pod["volumeMounts"])) for pod in pods(job)}
    assert mounts == {("/bundles", "/runs")}  # the same on every node
