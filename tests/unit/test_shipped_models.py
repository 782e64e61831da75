"""The weights in models/: they match their recipes and are small."""

from __future__ import annotations

from pathlib import Path

import pytest

from admtrt.config_files import load_config
from admtrt.models.checkpoint import load_network
from admtrt.run_config import RunConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "models" / "fashion-mnist"
RECIPES = {
    "unet": ("unet", "fashion-mnist.toml"),
    "classifier": ("classifier", "fashion-mnist.toml"),
    "unconditional": ("unet", "fashion-mnist-unconditional.toml"),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.safetensors")))
def test_a_file_is_what_its_recipe_makes(name: str) -> None:
    kind, recipe = RECIPES[name]
    config = load_config(RunConfig, ROOT / "configs" / recipe)
    loaded = load_network(FOLDER / f"{name}.safetensors", kind=kind)  # type: ignore[arg-type]
    assert loaded.config.network == config.network(kind)  # type: ignore[arg-type]
    assert (loaded.config.diffusion, loaded.config.sampler) == (config.diffusion, config.sampler)
    settings = f"train_{kind}"
    assert loaded.config.run is not None
    assert getattr(loaded.config.run, settings) == getattr(config, settings)
    assert loaded.config.step == getattr(config, settings).steps


def test_all_files_together_are_small() -> None:
    files = list(FOLDER.glob("*.safetensors"))
    assert {"unet", "classifier"} <= {path.stem for path in files}
    assert sum(path.stat().st_size for path in files) < 12e6
