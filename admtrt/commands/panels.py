"""Layout of ``--help``: panels of options, short options and examples, in one place for every command.

A parameter name means the same in every command, so the tables are keyed by name; :data:`OWN` has the
exceptions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PANELS: Mapping[str, tuple[str, ...]] = {
    "What": ("num", "classes", "seed", "low_res", "images", "graph", "engine", "likelihood", "count"),
    "Checkpoints": (
        "unet", "classifier", "preset", "unet_preset", "classifier_preset", "config", "unet_set",
        "classifier_set", "weights", "unet_weights", "classifier_weights", "null_class", "original",
    ),
    "Sampler": ("steps", "method", "scale", "clip", "guidance_interval", "all_solvers", "tolerance"),
    "Guides": ("guide", "guides"),
    "Second stage": ("upsample", "upsample_steps", "upsample_scale"),
    "Where it runs": (
        "backend", "precision", "fp32", "threads", "plans", "batch_size", "shard_size", "device", "ray",
        "features_backend",
    ),
}  # fmt: skip
"""Parameters of each panel. A parameter without a panel is shown first, under "Options"."""
OWN: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "serve": {
        "Address and access": ("host", "port", "token_file", "allow_host", "allow_origin"),
        "Batches": ("max_rows", "sizes", "memory", "order"),
        "Limits": (
            "timeout", "max_requests", "client_share", "max_body", "read_timeout", "max_connections",
            "drain_grace", "drain_timeout",
        ),
        "Jobs": ("spool", "spool_bytes", "keep"),
    },
    "build": {
        "How it is built": (
            "library", "precision", "batch", "target", "workspace", "optimization_level", "tf32",
            "timing_cache", "version_compatible", "hardware_compatible", "refit", "strip",
        ),
    },
    "bench": {
        "What": ("backend", "batch", "sampling", "training", "features", "against"),
        "Where it runs": ("device", "threads", "plans", "repeat", "work"),
    },
    "samples": {
        "What": ("reference", "features", "count", "seed", "floor", "nearest", "lossy"),
        "Metrics": ("metrics", "parts", "no_error", "self_check"),
    },
    "sweep": {
        "What": ("reference", "features", "count", "seed", "floor"),
        "Metrics": ("metrics", "parts", "no_error"),
    },
    "nll": {"What": ("data", "config", "set_", "images", "seed")},
    **{
        task: {
            "Over the file": ("data", "steps", "batch_size", "lr", "precision", "seed", "init", "teacher")
        }
        for task in ("unet", "classifier", "upsampler", "consistency")
    },
}  # fmt: skip
SHORT: Mapping[str, str] = {"out": "-o", "num": "-n", "classes": "-c", "steps": "-s", "formats": "-f"}
"""Short options by parameter."""
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "sample": (
        "admtrt sample mine.bundle -o samples --classes 0:10,3:10 --steps ddim25 --scale 2",
        "admtrt sample mine.bundle -o many --num 50000 --format npz --backend auto",
        "admtrt sample mine.bundle -o filled --known photo.png --mask mask.png --jump 10:10",
    ),
    "export": (
        "admtrt export unet.safetensors --classifier classifier.safetensors -o mine.bundle",
        "admtrt export 64x64_diffusion.pt --unet-preset 64x64_diffusion -o imagenet64.bundle",
        "admtrt export ddpm-cat-256 -o cats.bundle --engine fp16",
    ),
    "convert": (
        "admtrt convert 64x64_diffusion.pt unet.safetensors --preset 64x64_diffusion",
        "admtrt convert unet.safetensors half.safetensors --dtype fp16",
        "admtrt convert ema.pt unet.safetensors --config training.toml",
    ),
    "verify": (
        "admtrt verify mine.bundle --unet unet.safetensors --classifier classifier.safetensors",
        "admtrt verify mine.bundle --unet unet.safetensors --all-solvers",
        "admtrt verify mine.bundle --unet unet.safetensors --backend openvino --plot differences.png",
    ),
    "invert": (
        "admtrt invert mine.bundle --images photos -o inverted",
        "admtrt invert mine.bundle --images photos -o inverted --classes 3 --steps ddim250",
        "admtrt sample mine.bundle --latents inverted/latents.npz -o again",
    ),
    "build": (
        "admtrt build mine.bundle --precision fp16 --batch 1:4:16",
        "admtrt build mine.bundle --library rtx --target 89",
        "admtrt build mine.bundle --precision bf16 --report",
    ),
    "drift": (
        "admtrt drift mine.bundle --engine fp16",
        "admtrt drift mine.bundle --backend openvino --precision bf16",
        "admtrt drift mine.bundle --engine bf16 --plot drift.png",
    ),
    "bench": (
        "admtrt bench mine.bundle",
        "admtrt bench --preset 64x64_diffusion --batch 1 --batch 4",
        "admtrt bench --training training.toml",
    ),
    "serve": (
        "admtrt serve mine.bundle",
        "admtrt serve small.bundle --upsample large.bundle --max-rows 16",
        "admtrt serve mine.bundle --host 0.0.0.0 --token-file token --backend auto",
    ),
    "samples": (
        "admtrt evaluate samples samples --reference ref.npz --features inception.features",
        "admtrt evaluate samples samples --reference training.toml:train --features judge.features",
        "admtrt evaluate samples samples.npz --reference photos --features inception.features --lossy",
    ),
    "sweep": (
        "admtrt evaluate sweep mine.bundle --reference ref.npz --features f --scale 0,1,2 -o sweep",
        "admtrt evaluate sweep mine.bundle --reference ref.npz --features f --steps ddim25,100 -o sweep",
        "admtrt evaluate sweep mine.bundle --reference ref.npz --features f --precision fp32,bf16 -o sweep",
    ),
    "configure": (
        "admtrt configure photos -o photos.toml",
        "admtrt configure photos -o photos.toml --size 32",
        "admtrt configure images.npz -o images.toml",
    ),
    "triton": (
        "admtrt triton mine.bundle --out repository",
        "admtrt triton mine.bundle other.bundle --out repository",
        "admtrt triton mine.bundle --out repository --copy --backend openvino",
    ),
    "inspect": (
        "admtrt inspect mine.bundle",
        "admtrt inspect unet.safetensors",
        "admtrt inspect mine.bundle --json",
    ),
    "reference": (
        "admtrt evaluate reference photos -o ref.npz --features inception.features",
        "admtrt evaluate reference training.toml:train -o ref.npz --features judge.features",
        "admtrt evaluate reference images.npz -o ref.npz --features inception.features --backend auto",
    ),
    "nll": (
        "admtrt evaluate nll --unet unet.safetensors --data photos",
        "admtrt evaluate nll --bundle mine.bundle --data photos --images 100",
        "admtrt evaluate nll --bundle mine.bundle --config training.toml --set data.on_bad_file=skip",
    ),
    "classifier": (
        "admtrt train classifier training.toml -o runs/mine",
        "admtrt train classifier training.toml -o runs/mine --resume",
        "admtrt train classifier training.toml -o runs/mine --batch-size 64 --set data.random_flip=true",
    ),
    "unet": (
        "admtrt train unet training.toml -o runs/mine",
        "admtrt train unet training.toml -o runs/mine --resume",
        "admtrt train unet training.toml -o runs/tuned --init unet.safetensors --set train_unet.lr=1e-5",
    ),
}
"""Example command lines by command."""


def arrange(command: str, parameters: Iterable[Any]) -> None:
    """Assign a command's parameters to panels, and add the short options of :data:`SHORT`."""
    own = OWN.get(command, {})
    for parameter in parameters:
        if parameter.param_type_name != "option" or parameter.name == "help":
            continue
        panel = next((panel for panel, names in own.items() if parameter.name in names), None)
        if panel is None:
            panel = next((panel for panel, names in PANELS.items() if parameter.name in names), None)
        if parameter.rich_help_panel is None and not parameter.required:
            parameter.rich_help_panel = panel
        if parameter.name in SHORT and SHORT[parameter.name] not in parameter.opts:
            parameter.opts.append(SHORT[parameter.name])


def examples(command: str) -> str | None:
    """The examples for the end of a command's help; None without examples."""
    lines = EXAMPLES.get(command)
    return None if lines is None else "Examples:\n\n" + "\n".join(f"    {line}" for line in lines)
