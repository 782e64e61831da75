"""The wheel: the package, all of it, and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import admtrt

PACKAGE = Path(admtrt.__file__).parent
ROOT = PACKAGE.parent

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="the package under test is installed without its sources"
)


def sources() -> set[str]:
    """Every file of the package, as it is named in a wheel."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_package_holds_what_is_not_code() -> None:
    assert {"admtrt/py.typed", "admtrt/demo/digits.toml", "admtrt/serve/page.html"} <= sources()
    assert {Path(name).suffix for name in sources()} == {".py", ".typed", ".toml", ".html"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for backend in ("build", "hatchling"):
        if find_spec(backend) is None:
            pytest.skip(f"building a wheel needs {backend}")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.iterdir()
    return path


def test_the_wheel_is_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = f"admtrt-{admtrt.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(metadata)} == sources()
    assert {name.removeprefix(metadata) for name in names if name.startswith(metadata)} == {
        "METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE",
    }  # fmt: skip


def test_the_metadata(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = f"admtrt-{admtrt.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{folder}/METADATA").decode().splitlines()
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
    assert "admtrt = admtrt.__main__:main" in entry_points
    assert f"Version: {admtrt.__version__}" in metadata
    assert f"Requires-Python: {project['requires-python']}" in metadata
    extras = {line.removeprefix("Provides-Extra: ") for line in metadata if line.startswith("Provides-Extra")}
    assert extras == {extra.replace("_", "-") for extra in project["optional-dependencies"]}


def test_docstrings_open_with_their_subject() -> None:
    asks = re.compile(r'^ *"""(?:How|What|Which|Whether|Where|Who|Whose|When|Why)\b.*', re.MULTILINE)
    assert {
        str(path): found for path in PACKAGE.rglob("*.py") if (found := asks.findall(path.read_text()))
    } == {}
