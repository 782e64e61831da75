"""Bits per dim: the bound itself, the same from PyTorch and from the exported graph."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import CLASS_NAMES, UNET, network
from command_faults import refused
from images import save

from admtrt.cli import run
from admtrt.config import DiffusionConfig, UNetConfig
from admtrt.config_files import save_config
from admtrt.data.image_set import ImageSet, load_data
from admtrt.errors import AdmtrtError, DataError, RequestError
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.models.checkpoint import save_checkpoint
from admtrt.models.denoiser import TorchDenoiser
from admtrt.models.diffusion import Diffusion
from admtrt.run_config import DataConfig, RunConfig
from admtrt.runtime.noise import step_noise
from admtrt.schedule.process import process_from_config
from admtrt.training.losses import variational_bound
from admtrt.training.objectives import shrink
from admtrt.verify.nll import Likelihood, evaluate_nll
from admtrt.verify.nll_images import load_images

COUNT = 7
RNG = np.random.default_rng(3)
PIXELS = RNG.integers(0, 256, (COUNT, 8, 8, 1), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 3, 3, 1, 0])
CONDITIONED = UNetConfig.from_dict(UNET.to_dict() | {"num_classes": 4, "low_res_size": 4})
SHORT = DiffusionConfig(steps=8, schedule="cosine")
# The same sums in another order; the networks themselves agree to 1e-6.
PARITY = 1e-4


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported upsampler with classes: it takes every input that a UNet can have."""
    path = tmp_path_factory.mktemp("nll") / "bundle"
    bundle_from_checkpoints(network(CONDITIONED), None, path)
    return path


def npz(path: Path, pixels: np.ndarray = PIXELS, labels: np.ndarray | None = LABELS) -> Path:
    np.savez(path, arr_0=pixels, **({} if labels is None else {"arr_1": labels}))
    return path


def checkpoint(path: Path, config: UNetConfig, **fields: Any) -> Path:
    loaded = network(config, **fields)
    save_checkpoint(path, loaded.module.state_dict(), loaded.config)
    return path


def images_of(path: Path, config: UNetConfig = UNET, **fields: Any) -> ImageSet:
    data = {"source": str(path), "image_size": 8, "channels": 1} | fields
    return load_images(DataConfig.from_dict(data), config, ())


def evaluate(capsys: pytest.CaptureFixture[str], *options: Any) -> dict[str, Any]:
    """Run the command; its JSON."""
    code = run(["evaluate", "nll", "--json", *map(str, options)])
    shown, complaint = capsys.readouterr()
    assert code == 0, complaint
    found: dict[str, Any] = json.loads(shown)
    return found


def refusal(capsys: pytest.CaptureFixture[str], *options: Any) -> str:
    return refused(capsys, "evaluate", "nll", *options)


# --- PyTorch, the graph and the formula ----------------------------------------------------------------


def test_pytorch_and_the_exported_graph_agree(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And both with the bound of all images at once, computed from the papers' process."""
    data = npz(tmp_path / "data.npz")
    unet = checkpoint(tmp_path / "unet.safetensors", CONDITIONED)
    options = ["--data", data, "--steps", 6, "--seed", 5, "--batch-size", 3]
    ours = evaluate(capsys, "--unet", unet, *options)
    theirs = evaluate(capsys, "--bundle", bundle, *options)

    x_0 = torch.from_numpy(PIXELS.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
    module = network(CONDITIONED).module
    bound = variational_bound(
        Diffusion(DiffusionConfig(), process_from_config(DiffusionConfig(), "6")),
        lambda x, t: module(x, t, torch.from_numpy(LABELS), shrink(x_0, 4)),
        x_0,
        lambda step: torch.from_numpy(step_noise(range(5, 5 + COUNT), [step] * COUNT, (1, 8, 8))),
    )
    expected = {
        "bits_per_dim": bound.total.mean().item(),
        "standard_error": bound.total.std().item() / COUNT**0.5,
        "prior": bound.prior.mean().item(),
        "terms": bound.terms.mean(dim=0).tolist(),
        "x_0_mse": bound.x_0_mse.mean(dim=0).tolist(),
        "eps_mse": bound.eps_mse.mean(dim=0).tolist(),
    }
    for key, value in expected.items():
        np.testing.assert_allclose(ours[key], value, rtol=PARITY, err_msg=key)
        np.testing.assert_allclose(theirs[key], value, rtol=PARITY, err_msg=key)
    assert ours["timesteps"] == theirs["timesteps"] == [999, 799, 599, 400, 200, 0]
    assert ours["images"] == COUNT
    assert ours["steps"] == 6
    assert ours["bits_per_dim"] == pytest.approx(ours["prior"] + sum(ours["terms"]))


class Formula:
    """A function of x and t in a UNet's place."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet

    def run(self, graph: str, feeds: Any) -> Any:
        assert graph == "unet"
        return {"out": self.unet(**feeds)}


def test_a_network_that_knows_the_answer_has_no_loss_but_the_decoders() -> None:
    """Black images and their exact eps: every KL vanishes, so a wrong t, x_t or term would show."""
    config = UNET.model_copy(update={"learn_sigma": False})
    diffusion = DiffusionConfig(variance_type="fixed_small")
    data = ImageSet(DataConfig(source="black", image_size=8, channels=1), np.zeros((3, 8, 8, 1), np.uint8))
    process = process_from_config(diffusion)
    a = dict(zip(process.model_t.tolist(), process.alpha_bar.tolist(), strict=True))

    def unet(x: Any, t: Any) -> Any:
        level = np.array([a[time] for time in t.tolist()])[:, None, None, None]
        return ((x + np.sqrt(level)) / np.sqrt(1 - level)).astype(np.float32)

    found = evaluate_nll(Formula(unet), config, diffusion, data)
    assert len(found.terms) == 1000
    assert found.timesteps == tuple(range(999, -1, -1))
    assert max(map(abs, found.terms[:-1])) < 1e-6
    assert max(found.x_0_mse) < 1e-9
    assert 0 < found.prior < 1e-4
    assert found.bits_per_dim == pytest.approx(found.prior + found.terms[-1], abs=1e-4)
    # The rest of N(-1, sigma) beyond the bin of black, with the variance of the second step (IDDPM).
    sigma = np.exp(process.posterior_log_variance[0] / 2)
    mass = 0.5 * (1 + math.erf(1 / 255 / sigma / 2**0.5))
    assert found.terms[-1] == pytest.approx(-math.log2(mass), abs=1e-3)


def torch_nll(data: ImageSet, **options: Any) -> Likelihood:
    return evaluate_nll(TorchDenoiser(network(UNET).module), UNET, SHORT, data, **options)


def test_the_full_bound_has_every_step(tmp_path: Path) -> None:
    steps: list[int] = []
    found = torch_nll(images_of(npz(tmp_path / "data.npz")), batch_size=4, progress=steps.append)
    assert found.timesteps == (7, 6, 5, 4, 3, 2, 1, 0)
    assert steps == [4] * 8 + [3] * 8
    alone = torch_nll(images_of(npz(tmp_path / "data.npz")), batch_size=1)
    assert alone.bits_per_dim == pytest.approx(found.bits_per_dim, rel=PARITY)
    assert torch_nll(images_of(npz(tmp_path / "data.npz")), steps="4").timesteps == (7, 5, 2, 0)


# --- which images ---------------------------------------------------------------------------------------


def test_some_images_drawn_by_the_seed(tmp_path: Path) -> None:
    """The mean over some is that of those among all: an image's bound does not depend on the others."""
    data = images_of(npz(tmp_path / "data.npz"))
    seeds = range(20)
    rows = [np.sort(np.random.default_rng(seed).permutation(COUNT)[:3]) for seed in seeds]
    assert len({tuple(chosen) for chosen in rows}) > 5
    some = torch_nll(data, count=3, seed=4)
    assert some.images == 3
    singles = [
        torch_nll(data.subset(np.array([row])), seed=4 + int(row)).bits_per_dim for row in rows[4].tolist()
    ]
    assert some.bits_per_dim == pytest.approx(np.mean(singles), rel=PARITY)
    assert some.standard_error == pytest.approx(np.std(singles, ddof=1) / 3**0.5, rel=PARITY)
    assert torch_nll(data, count=1).standard_error is None
    assert torch_nll(data, seed=1).bits_per_dim != torch_nll(data, seed=0).bits_per_dim


def test_held_out_images_without_augmentation(tmp_path: Path) -> None:
    labels = np.arange(40) % 4  # of ten images of each class, a fifth is held out
    pixels = np.zeros((40, 8, 8, 1), np.uint8)
    pixels[:, :, :4] = np.arange(40, dtype=np.uint8)[:, None, None, None] + 100
    path = npz(tmp_path / "data.npz", pixels, labels)
    data = images_of(path, hold_out=0.2, random_flip=True, random_crop=True)
    assert len(data) == 8
    rng = np.random.default_rng(0)
    values = []
    for row in range(len(data)):
        image = np.rint((data.image(row, rng)[0] + 1) * 127.5)
        assert (image[:, 4:] == 0).all()
        values.append(int(image[0, 0]) - 100)
    assert len(set(values)) == len(values)
    whole = images_of(path, random_flip=True, random_crop=True)
    assert len(whole) == 40
    assert all((whole.image(row, rng)[0, :, 4:] == -1).all() for row in range(40))


def test_the_training_file_says_how_to_read_the_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = checkpoint(tmp_path / "unet.safetensors", UNET, diffusion=SHORT)
    config = RunConfig.from_dict(
        {
            "data": {"source": str(npz(tmp_path / "a.npz")), "image_size": 8, "channels": 1, "hold_out": 0.5},
            "diffusion": SHORT.to_dict(),
            "unet": UNET.to_dict(),
        }
    )
    save_config(config, tmp_path / "run.toml")
    found = evaluate(capsys, "--unet", unet, "--config", tmp_path / "run.toml")
    assert 0 < found["images"] < COUNT
    assert found["data"]["hold_out"] == 0.5
    assert len(found["terms"]) == 8
    other = npz(tmp_path / "b.npz", 255 - PIXELS)
    changed = evaluate(capsys, "--unet", unet, "--config", tmp_path / "run.toml", "--data", other)
    assert changed["images"] == found["images"]
    assert changed["bits_per_dim"] != found["bits_per_dim"]
    assert run(["evaluate", "nll", "--unet", str(unet), "--data", str(other), "--images", "2"]) == 0
    assert "bits per dim" in capsys.readouterr().out


# --- faults -----------------------------------------------------------------------------------------------


def test_bad_requests(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--bundle", bundle]
    data = ["--data", npz(tmp_path / "data.npz")]
    unet = ["--unet", checkpoint(tmp_path / "unet.safetensors", UNET)]
    assert "give either --unet" in refusal(capsys, *data)
    assert "give either --unet" in refusal(capsys, *data, *given, *unet)
    assert "there are no images" in refusal(capsys, *given)
    assert "are for a checkpoint" in refusal(capsys, *given, *data, "--unet-preset", "64x64_diffusion")
    assert "are for a checkpoint" in refusal(capsys, *given, *data, "--unet-set", "image_size=8")
    assert "batch_size is 0" in refusal(capsys, *given, *data, "--batch-size", 0)
    assert "0 images were asked for" in refusal(capsys, *given, *data, "--images", 0)
    assert "8 images were asked for" in refusal(capsys, *unet, *data, "--images", COUNT + 1)
    assert "no integer stride" in refusal(capsys, *unet, *data, "--steps", "ddim300")
    assert "seed -1 is out of range" in refusal(capsys, *given, *data, "--seed", -1)
    assert "seed -1 is out of range" in refusal(capsys, *given, *data, "--seed", -1, "--images", 2)
    assert "leave the range" in refusal(capsys, *given, *data, "--seed", 2**64 - 3)
    assert "absent does not exist" in refusal(capsys, "--bundle", "absent", *data)
    assert "absent.pt does not exist" in refusal(capsys, "--unet", "absent.pt", *data)


def test_bad_data(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--bundle", bundle]
    for name, labels, message in (
        ("bare", None, "has no labels, and 4 classes were to be learned"),
        ("many", LABELS % 3 + 2, "has 5 classes (0, 1, 2, 3, 4), and the network has num_classes 4"),
    ):
        path = npz(tmp_path / f"{name}.npz", labels=labels)
        assert message in refusal(capsys, *given, "--data", path)
    assert "nowhere does not exist" in refusal(capsys, *given, "--data", "nowhere")
    (tmp_path / "noise.npz").write_bytes(b"PK\x03\x04 no archive")
    assert "no .npz archive" in refusal(capsys, *given, "--data", tmp_path / "noise.npz")
    save_config(
        RunConfig.from_dict({"data": {"source": "digits", "image_size": 16}}), tmp_path / "large.toml"
    )
    complaint = refusal(capsys, *given, "--config", tmp_path / "large.toml")
    assert "set to 16 pixels and 3 channels; the network has 8 pixels and 1 channels" in complaint


def test_classes_of_another_meaning(tmp_path: Path) -> None:
    """Class names are compared with the network's; numbers are its labels."""
    config = UNetConfig.from_dict(UNET.to_dict() | {"num_classes": 3})
    for name in ("ant", "bee", "dog"):
        save(tmp_path / "images" / name / "a.png")
    data = DataConfig(source=str(tmp_path / "images"), image_size=8, channels=1)
    with pytest.raises(DataError, match=r"classes ant, bee, dog; the network was trained on ant, bee, cat"):
        load_images(data, config, CLASS_NAMES)
    (tmp_path / "images" / "dog").rename(tmp_path / "images" / "cat")
    assert load_images(data, config, CLASS_NAMES).class_names == CLASS_NAMES
    assert len(load_images(data, config, ())) == 3
    numbered = DataConfig(source=str(npz(tmp_path / "n.npz", labels=LABELS % 3)), image_size=8, channels=1)
    assert load_images(numbered, config, CLASS_NAMES).class_names == ("0", "1", "2")
    some = npz(tmp_path / "s.npz", labels=LABELS % 2 * 2)  # class 1 does not occur
    found = load_images(DataConfig(source=str(some), image_size=8, channels=1), config, CLASS_NAMES)
    np.testing.assert_array_equal(found.labels, LABELS % 2 * 2)


def test_numbers_that_a_network_learned_as_text(tmp_path: Path) -> None:
    """Folders are sorted as text: the third class of twelve is then "10"."""
    config = UNetConfig.from_dict(UNET.to_dict() | {"num_classes": 12})
    for name in range(12):
        save(tmp_path / "images" / str(name) / "a.png")
    data = DataConfig(source=str(tmp_path / "images"), image_size=8, channels=1)
    trained = load_data(data)
    assert trained.class_names[2] == "10"
    found = load_images(data, config, trained.class_names)
    assert found.class_names == trained.class_names
    np.testing.assert_array_equal(found.labels, trained.labels)
    numbered = load_images(data, config, ())
    assert [numbered.class_names[label] for label in numbered.labels] == [
        trained.class_names[label] for label in trained.labels
    ]


def test_a_bound_that_is_no_number(tmp_path: Path) -> None:
    data = images_of(npz(tmp_path / "data.npz"))
    with pytest.raises(AdmtrtError, match="not finite for 7 of 7 images") as caught:
        evaluate_nll(Formula(lambda x, t: np.concatenate([x * np.nan] * 2, axis=1)), UNET, SHORT, data)
    assert caught.value.exit_code == 1
    with pytest.raises(RequestError, match="batch_size is -1"):
        torch_nll(data, batch_size=-1)
