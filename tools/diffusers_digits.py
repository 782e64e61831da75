"""Train a small model of the digits with diffusers itself, guide it by a noisy classifier of ours, and judge.

    python tools/diffusers_digits.py OUT [--steps N]

The model is trained as its unconditional training example does by default: eps of 1000
linear steps, mean squared error, AdamW (lr 1e-4, betas 0.95 and 0.999, weight decay 1e-6), warm-up over 500
steps and a cosine after it, averaged weights; then written by DDPMPipeline. Its folder is all that admtrt is
given. Prints a table: sampler, guidance scale, the fraction of 200 samples that the demo's judge finds to be
of their class, and their diversity.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import numpy as np
import torch

from admtrt.console import Output
from admtrt.data.image_set import load_data, split
from admtrt.demo.judge import Judge
from admtrt.demo.run import demo_config
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.models.checkpoint import load_identified, load_network, open_checkpoint
from admtrt.models.identify import identify_checkpoint
from admtrt.run_config import RunConfig
from admtrt.runtime.pipeline import Pipeline
from admtrt.training.loop import train

SAMPLES = 200
"""Judged, 20 of each class."""
SAMPLERS = (("ddpm", "50"), ("ddim", "leading:25"))
SCALES = (0.0, 2.0, 4.0, 8.0)
_BATCH = 64


def train_with_diffusers(out: Path, steps: int) -> Path:
    """A folder that diffusers wrote, of a model that it trained for so many steps."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    config = demo_config().data
    images, _ = split(load_data(config), config.hold_out)
    assert isinstance(images.images, np.ndarray)
    x_0 = torch.from_numpy(images.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
    averaged = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for step in range(steps):
        clean = x_0[torch.randint(len(x_0), (_BATCH,))]
        noise, t = torch.randn_like(clean), torch.randint(1000, (_BATCH,))
        predicted = network(scheduler.add_noise(clean, noise, t), t).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        decay = min(0.9999, 1 - (1 + step) ** -0.75)  # the example's averages
        with torch.no_grad():
            for mean, value in zip(averaged.parameters(), network.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}/{steps}: loss {loss.item():.4f}", flush=True)
    DDPMPipeline(averaged, scheduler).save_pretrained(out)
    return out


def _rate(step: int, steps: int) -> float:
    warm_up = min(500, steps // 2)
    if step < warm_up:
        return step / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


def guided(folder: Path, out: Path) -> dict[tuple[str, float], float]:
    """The judged accuracy of a folder's samples, guided by a classifier for its process; prints a table."""
    stored = open_checkpoint(folder)
    unet = load_identified(identify_checkpoint(stored, kinds=("unet",)))
    demo = demo_config()
    config = RunConfig.from_dict(
        {
            "data": demo.data,
            "diffusion": unet.config.diffusion,
            "classifier": demo.classifier,
            "train_classifier": demo.train_classifier,
        }
    )
    train("classifier", config, out, output=Output(), resume=True)
    classifier = load_network(out / "classifier.safetensors", kind="classifier")
    bundle = bundle_from_checkpoints(unet, classifier, out / "bundle", overwrite=True)
    judge, pipeline = Judge(demo.data), Pipeline.from_bundle(bundle)
    labels = [index % 10 for index in range(SAMPLES)]
    found = {}
    print("| sampler | scale | accuracy | diversity |\n|---|---|---|---|")
    for method, steps in SAMPLERS:
        for scale in SCALES:
            samples = pipeline(
                labels, range(SAMPLES), method=method, steps=steps, scale=scale, batch_size=100
            )
            verdict = judge(samples.images, np.array(labels))
            found[method, scale] = verdict.accuracy
            row = f"| {method}, {steps} | {scale:g} | {verdict.accuracy:.1%} | {verdict.diversity:.2f} |"
            print(row, flush=True)
    return found


def main() -> None:
    """Train, guide and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    arguments = parser.parse_args()
    folder = arguments.out / "folder"
    if not (folder / "model_index.json").exists():
        train_with_diffusers(folder, arguments.steps)
    guided(folder, arguments.out)


if __name__ == "__main__":
    main()
