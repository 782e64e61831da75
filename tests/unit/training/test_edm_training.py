"""Training on a process of kind edm, and of consistency models."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import UNET, network
from training_runs import NETWORK, TRAINING, lines, run, same

from admtrt.config import EdmConfig, UNetConfig
from admtrt.errors import CheckpointError, ConfigError, OutputError
from admtrt.models.checkpoint import load_network, save_checkpoint
from admtrt.models.edm import denoise, heun_step
from admtrt.run_config import ConsistencyTrainingConfig, RunConfig
from admtrt.training.consistency import ConsistencyObjective, levels_at, target_rate
from admtrt.training.objectives import EdmObjective, edm_weights
from admtrt.training.timesteps import IndexSampler, LogNormalSampler, Stream

CPU = torch.device("cpu")
EDM = {"kind": "edm", "boundary": False, "sigma_max": 20.0}
CONDITIONAL = {"num_classes": 10, "learn_sigma": False}


def edm_config(*, unet: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    training = {key: TRAINING | sections.pop(key, {}) for key in ("train_unet", "train_consistency")}
    return RunConfig.from_dict(
        {
            "data": {"source": "digits", "image_size": 8, "channels": 1, "hold_out": 0.1},
            "diffusion": EDM,
            "unet": NETWORK | CONDITIONAL | (unet or {}),
            **training,
            **sections,
        }
    )


def process(**changes: Any) -> EdmConfig:
    return EdmConfig.from_dict(EDM | changes)


# --- the formulas -----------------------------------------------------------------------------------------


def test_karras_weight_is_that_of_the_paper() -> None:
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    expected = (sigma**2 + 0.75**2) / (sigma * 0.75) ** 2
    torch.testing.assert_close(edm_weights("karras", sigma, 0.75), expected, rtol=1e-12, atol=0)
    snr = sigma**-2
    for name, value in (
        ("snr", snr),
        ("snr+1", snr + 1),
        ("truncated-snr", snr.clamp(min=1)),
        ("uniform", torch.ones_like(snr)),
    ):
        assert torch.equal(edm_weights(name, sigma, 0.75), value)


def test_a_network_held_to_its_boundary_is_the_identity_there() -> None:
    x = torch.randn(2, 1, 4, 4)
    sigma = torch.tensor([0.002, 1.0])
    seen = {}

    def wild(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen["t"] = t
        return 1e3 + 0 * x

    bound = denoise(process(boundary=True), wild, x, sigma)
    assert torch.equal(bound[0], x[0])
    assert not torch.allclose(bound[1], x[1])
    assert not torch.allclose(denoise(process(), wild, x, sigma)[0], x[0])
    np.testing.assert_allclose(seen["t"], 250 * np.log([0.002, 1.0]), rtol=1e-6)


def test_heuns_step_is_of_second_order() -> None:
    """On x_0 ~ N(0, d^2), whose exact denoiser is c_skip x: the ODE's solution is x sqrt(S'^2+d^2)/.."""
    config, data = process(sigma_data=0.5), 0.5
    errors = []
    for steps in (8, 16):
        levels = torch.linspace(2.0, 1.0, steps + 1, dtype=torch.float64)
        x = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
        for sigma, to in pairwise(levels):
            x = heun_step(config, lambda x, _: 0 * x, x, sigma[None], to[None])
        exact = 3.0 * math.sqrt((1 + data**2) / (4 + data**2))
        errors.append(abs(float(x) - exact))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_noise_levels_are_log_normal() -> None:
    drawn = LogNormalSampler(-1.2, 1.2).draw(Stream.TIMESTEPS, 0, 0, 20_000)
    logs = np.log(drawn.levels)
    # Standard errors 0.008 and 0.006.
    assert abs(logs.mean() + 1.2) < 0.04
    assert abs(logs.std() - 1.2) < 0.03
    assert drawn.levels.dtype == np.float32
    for quartile in range(4):
        assert abs((drawn.quartiles == quartile).mean() - 0.25) < 0.02
    assert drawn.levels[drawn.quartiles == 0].max() <= drawn.levels[drawn.quartiles == 1].min()


def test_indices_reach_every_level_but_the_last() -> None:
    drawn = IndexSampler(lambda step: 3 + step).draw(Stream.TIMESTEPS, 0, 5, 400)
    assert set(drawn.levels.tolist()) == set(range(8))
    assert drawn.quartiles[drawn.levels == 0].tolist()[0] == 3  # the noisiest
    assert drawn.quartiles[drawn.levels == 7].tolist()[0] == 0


def test_growing_levels_are_those_of_the_original() -> None:
    settings = ConsistencyTrainingConfig(steps=800_000, levels=201, first_levels=2, target_ema=0.95)
    # create_ema_and_scales_fn("adaptive", 0.95, "progressive", 2, 200, 800000) of consistency_models.
    for step, levels, rate in ((0, 2, 0.9025), (100_000, 72, 0.998556), (800_000, 201, 0.999487)):
        assert levels_at(settings, step) == levels
        assert target_rate(settings, step) == pytest.approx(rate, abs=1e-6)
    fixed = ConsistencyTrainingConfig(levels=40, target_ema=0.95)
    assert (levels_at(fixed, 0), levels_at(fixed, 999)) == (40, 40)
    assert target_rate(fixed, 5) == 0.95


class Recorder(torch.nn.Module):
    """A network that returns a constant and records its inputs."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: Any, low_res: Any) -> torch.Tensor:
        self.seen = (x, t, y)
        return self.value.expand_as(x)


def by_hand(x: torch.Tensor, sigma: float, out: float, low: float | None) -> torch.Tensor:
    """Song et al. 2023, appendix C; plain for ``low`` None."""
    d, above = 0.5, sigma if low is None else sigma - low
    return d**2 / (above**2 + d**2) * x + above * d / math.sqrt(sigma**2 + d**2) * out


@pytest.mark.parametrize(("distance", "weighting"), [("l2", "uniform"), ("pseudo_huber", "inverse-step")])
def test_the_loss_of_consistency_training(distance: str, weighting: str) -> None:
    settings = {"levels": 3, "distance": distance, "weighting": weighting}
    objective = ConsistencyObjective(edm_config(train_consistency=settings), CPU)
    learned = Recorder(0.3)
    objective.begin(learned)
    objective.target.value.data.fill_(-0.2)
    x_0, noise = torch.rand(1, 1, 8, 8), torch.randn(1, 1, 8, 8)
    loss = objective(learned, x_0, torch.tensor([3]), torch.tensor([0]), noise)["loss"]
    middle = ((20 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    predicted = by_hand(x_0 + 20 * noise, 20, 0.3, 0.002)
    target = by_hand(x_0 + middle * noise, middle, -0.2, 0.002)
    squared = (predicted - target).square()
    if distance == "l2":
        expected = squared.mean()
    else:
        c = 0.00054 * 8
        expected = ((squared.sum() + c**2).sqrt() - c) / (20 - middle)
    torch.testing.assert_close(loss[0], expected, rtol=1e-5, atol=0)
    assert learned.seen[2].tolist() == [3]
    loss.sum().backward()
    assert learned.value.grad is not None
    assert objective.target.value.grad is None


def test_the_loss_of_a_diffusion_model() -> None:
    config = edm_config(train_unet={"sigma_mean": 0.5})
    objective = EdmObjective(process(), config.train_unet, class_conditional=True, low_res_size=None)
    x_0, noise, sigma = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([0.1, 4.0])
    found = objective(Recorder(0.3), x_0, torch.tensor([3, 4]), sigma, noise)
    for row, level in enumerate(sigma.tolist()):
        mse = (by_hand(x_0[row] + level * noise[row], level, 0.3, None) - x_0[row]).square().mean()
        torch.testing.assert_close(found["mse"][row], mse, rtol=1e-5, atol=0)
        weight = (level**2 + 0.25) / (level * 0.5) ** 2
        torch.testing.assert_close(found["loss"][row], mse * weight, rtol=1e-5, atol=0)


# --- runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    return run(edm_config(train_unet={"sample_every": 4}), out).weights[0]


def distilled(teacher: Path | None, **settings: Any) -> RunConfig:
    given = {} if teacher is None else {"teacher": str(teacher)}
    return edm_config(
        train_consistency={"levels": 5, "steps": 6, "checkpoint_every": 3, **given, **settings},
        unet={"dropout": 0.2},
    )


def test_a_teacher_says_what_it_is(teacher: Path) -> None:
    config = load_network(teacher, kind="unet").config
    assert config.diffusion == process()
    assert (config.sampler.method, config.sampler.steps, config.sampler.scale) == ("heun", "35", 0.0)
    assert config.class_names == tuple("0123456789")
    assert (teacher.parent / "unet" / "samples" / "step-000004.png").exists()
    assert all(math.isfinite(line["held_out_loss"]) for line in lines(teacher.parent))


@pytest.mark.parametrize("distils", [True, False])
def test_a_stopped_run_goes_on_bit_for_bit(teacher: Path, tmp_path: Path, distils: bool) -> None:
    config = distilled(teacher if distils else None, **({} if distils else {"first_levels": 2}))
    run(config, tmp_path / "whole", kind="consistency")
    half = tmp_path / "half"

    with pytest.MonkeyPatch.context() as patch:
        stepped = ConsistencyObjective.stepped

        def stop_at_4(self: Any, learned: Any, step: int, *, changed: bool) -> None:
            stepped(self, learned, step, changed=changed)
            if step == 4:
                raise KeyboardInterrupt

        patch.setattr(ConsistencyObjective, "stepped", stop_at_4)
        with pytest.raises(KeyboardInterrupt):
            run(config, half, kind="consistency")
    run(config, half, kind="consistency", resume=True)
    for name in ("consistency.safetensors", "consistency/state.safetensors"):
        assert same(half / name, tmp_path / "whole" / name), name
    assert lines(half, "consistency") == lines(tmp_path / "whole", "consistency")
    made = load_network(half / "consistency.safetensors", kind="unet").config
    assert made.diffusion == process(boundary=True)
    assert (made.sampler.method, made.sampler.steps, made.sampler.levels_of) == ("consistency", "2", 5)


def test_a_student_begins_as_its_teacher(teacher: Path) -> None:
    objective = ConsistencyObjective(distilled(teacher), CPU)
    student = network(UNetConfig.from_dict(NETWORK | CONDITIONAL), diffusion=process()).module
    objective.begin(student)
    theirs = load_network(teacher, kind="unet").module.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in student.state_dict().items())
    student.out[2].bias.data.add_(1.0)
    objective.stepped(student, 1, changed=True)
    moved = objective.state()[0]["out.2.bias"] - theirs["out.2.bias"]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05), rtol=0, atol=1e-6)
    objective.stepped(student, 2, changed=False)
    assert torch.equal(objective.state()[0]["out.2.bias"], moved + theirs["out.2.bias"])


def test_another_teacher_in_the_place_of_the_old_one(teacher: Path, tmp_path: Path) -> None:
    copy = tmp_path / "teacher.safetensors"
    copy.write_bytes(teacher.read_bytes())
    config = distilled(copy, steps=1)
    run(config, tmp_path / "out", kind="consistency")
    loaded = load_network(teacher, kind="unet")
    weights = {key: value + 0.5 for key, value in loaded.module.state_dict().items()}
    save_checkpoint(copy, weights, loaded.config)
    more = distilled(copy, steps=2)
    with pytest.raises(ConfigError, match=r"learned from another file than .*teacher\.safetensors now is"):
        run(more, tmp_path / "out", kind="consistency", resume=True)
    with pytest.raises(OutputError, match=r"train_consistency\.teacher is"):
        run(distilled(teacher, steps=2), tmp_path / "out", kind="consistency", resume=True)


def save_unet(path: Path, unet: UNetConfig, **fields: Any) -> Path:
    made = network(unet, **fields)
    save_checkpoint(path, made.module.state_dict(), made.config)
    return path


def test_teachers_that_cannot_teach(tmp_path: Path) -> None:
    plain = UNetConfig.from_dict(NETWORK | CONDITIONAL)
    fields = {"sampler": {"method": "heun", "steps": "35", "scale": 0.0}}
    for name, made, message in (
        ("d", save_unet(tmp_path / "d.safetensors", UNET), "was trained on a process of kind 'discrete'"),
        (
            "b",
            save_unet(tmp_path / "b.safetensors", plain, diffusion=process(boundary=True), **fields),
            "is a consistency model",
        ),
        (
            "s",
            save_unet(tmp_path / "s.safetensors", plain, diffusion=process(sigma_max=80.0), **fields),
            "sigma_max is 80.0 there, 20.0 here",
        ),
        (
            "u",
            save_unet(
                tmp_path / "u.safetensors",
                plain.model_copy(update={"num_classes": None}),
                diffusion=process(),
                **fields,
            ),
            "num_classes is None there, 10 here",
        ),
        ("x", tmp_path / "absent.safetensors", "does not exist"),
    ):
        with pytest.raises(CheckpointError) as caught:
            run(distilled(made), tmp_path / name, kind="consistency")
        assert message in caught.value.message
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("unet", {"diffusion": EDM | {"boundary": True}}, "diffusion.boundary is true"),
        ("unet", {"train_unet": {"loss": "vlb"}}, "train_unet.loss is 'vlb'"),
        ("unet", {"train_unet": {"loss": "hybrid"}}, "train_unet.loss is 'hybrid'"),
        (
            "unet",
            {"train_unet": {"timestep_sampler": "loss_second_moment"}},
            "train_unet.timestep_sampler is",
        ),
        ("unet", {"train_unet": {"snr_weighting": "p2"}}, "train_unet.snr_weighting is 'p2'"),
        ("consistency", {"train_consistency": {"snr_weighting": "p2"}}, "train_consistency.snr_weighting is"),
        ("unet", {"train_unet": {"weighting": "inverse-step"}}, "belongs to consistency models"),
        ("unet", {"sampler": {"method": "ddim", "steps": "25"}}, "[sampler] cannot be used: method 'ddim'"),
        ("unet", {"sampler": {"steps": "10"}}, "[sampler] cannot be used: heun spends an odd number"),
        ("consistency", {"train_consistency": {"sigma_mean": 0.0}}, "train_consistency.sigma_mean is 0.0"),
        ("consistency", {"train_consistency": {"loss": "simple"}}, "train_consistency.loss is 'simple'"),
        ("consistency", {"diffusion": {"schedule": "cosine"}}, "trained on a process of kind 'edm'"),
        (
            "classifier",
            {"classifier": NETWORK | {"num_classes": 10, "num_head_channels": 16}},
            "a process of kind 'edm' takes no noisy classifier",
        ),
        (
            "unet",
            {
                "diffusion": {"schedule": "cosine", "variance_type": "fixed_small"},
                "train_unet": {"weighting": "snr"},
            },
            "train_unet.weighting is 'snr', which belongs to processes of kind 'edm'",
        ),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    tmp_path: Path, task: str, changes: dict[str, Any], message: str
) -> None:
    if changes.get("diffusion", {}).get("schedule") and task == "consistency":
        changes = changes | {"diffusion": changes["diffusion"] | {"variance_type": "fixed_small"}}
    with pytest.raises(ConfigError) as caught:
        run(edm_config(**changes), tmp_path / "run", kind=task)
    assert message in caught.value.message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first_levels": 50}, "first_levels 50 is above levels 40"),
        ({"huber_c": 0.1}, "huber_c belongs to the distance 'pseudo_huber'"),
        ({"distance": "lpips"}, "'train_consistency.distance' is 'lpips'"),
        ({"target_ema": 1.0}, "'train_consistency.target_ema' is 1.0"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        edm_config(train_consistency=settings)
    assert message in caught.value.message
