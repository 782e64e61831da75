"""``admtrt triton``: write a model repository for NVIDIA's Triton."""

from __future__ import annotations

import json as json_module
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from admtrt.commands.options import BackendName, PrecisionName, Threads
from admtrt.console import Output
from admtrt.runtime.backends.default import DEFAULT_BACKEND

if TYPE_CHECKING:
    from collections.abc import Mapping

    from admtrt.bundle import Bundle

_MODEL = '''"""Loaded by Triton's Python backend, which knows no PYTHONPATH."""

import site

for place in {places}:
    site.addsitedir(place)

import triton_python_backend_utils as pb_utils

from admtrt.serve.triton_model import TritonModel


class TritonPythonModel(TritonModel):
    """See admtrt.serve.triton_model."""

    def __init__(self):
        super().__init__(pb_utils)
'''
_RUN = """# Running this repository

```
tritonserver --model-repository {repository}
```
Python {python} must be that of the server's Python backend, and is the one that admtrt is installed in.

Requests are answered by a stream: over gRPC by `ModelStreamInfer`, over HTTP by `/v2/models/NAME/generate`
and `generate_stream`; plain `infer` over HTTP answers 501 for such models.

Inputs: `label` INT64 [N], `seed` UINT64 [N], and as UINT8 [N,H,W,C] `init`, images to begin at (with the
parameter `strength`), and `low_res`, the images that an upsampler enlarges. Outputs: `images` UINT8
[N,H,W,C], `step` INT32 [1]. Parameters of a request are fields of `POST /v1/samples` of admtrt's own
server: `steps`, `method`, `scale`, ..., and `preview_every`. Known regions, guides besides the classifier,
and cascades are served only there.

Clients of gRPC keep the parameter `timeout` for Triton's own; over HTTP it is ours.

Triton's own queue limits and durations see only the moment in which a request is let in; `admtrt_*` in its
metrics count the engine's.
"""


def triton(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="Directories of bundles, or NAME=BUNDLE.")
    ],
    out: Annotated[Path, typer.Option(help="The model repository, a new directory.")],
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the bundles instead of linking to them.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing repository.")] = False,
    max_rows: Annotated[int, typer.Option(min=1, max=4096, help="The largest batch to try.")] = 16,
    timeout: Annotated[float, typer.Option(min=0.1, help="Time limit of a request, in seconds.")] = 300.0,
    backend: BackendName = DEFAULT_BACKEND,
    precision: PrecisionName = "fp32",
    threads: Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a model repository for Triton, which then serves bundles with the engine of admtrt serve."""
    from admtrt.bundle import Bundle
    from admtrt.commands.serve import named_bundles
    from admtrt.files import atomic_directory
    from admtrt.runtime.backends.choice import BackendChoice

    output = Output(json=json)
    BackendChoice(backend, precision, threads)  # type: ignore[arg-type]  # checks them
    opened = {name: Bundle.open(path) for name, path in named_bundles(bundles).items()}
    settings = {
        "backend": backend,
        "precision": precision,
        "max_rows": str(max_rows),
        "timeout": f"{timeout:g}",
    } | ({} if threads is None else {"threads": str(threads)})
    with atomic_directory(out, overwrite=overwrite) as made:
        for name, bundle in opened.items():
            _write(made / name, name, bundle, settings, copy=copy)
        text = _RUN.format(repository=out, python=f"{sys.version_info.major}.{sys.version_info.minor}")
        (made / "RUN.md").write_text(text, encoding="utf-8")
    output.result(
        {"repository": str(out), "models": list(opened)},
        f"{out}: {', '.join(opened)}; {out}/RUN.md says how to run it",
    )


def _write(folder: Path, name: str, bundle: Bundle, settings: Mapping[str, str], *, copy: bool) -> None:
    import site

    import admtrt

    (folder / "1").mkdir(parents=True)
    places = [*site.getsitepackages(), str(Path(admtrt.__file__).parents[1])]
    (folder / "1" / "model.py").write_text(_MODEL.format(places=places), encoding="utf-8")
    (folder / "config.pbtxt").write_text(_config(name, bundle, settings), encoding="utf-8")
    if copy:
        shutil.copytree(bundle.path, folder / "bundle")
    else:
        (folder / "bundle").symlink_to(bundle.path.resolve(), target_is_directory=True)


def _config(name: str, bundle: Bundle, settings: Mapping[str, str]) -> str:
    """The configuration of a decoupled model, in which the engine batches instead of Triton."""
    pixels = "TYPE_UINT8", "[ -1, -1, -1, -1 ]"
    inputs = [("seed", "TYPE_UINT64", "[ -1 ]", "false"), ("init", *pixels, "true")]
    if bundle.manifest.num_classes is not None:
        inputs.append(("label", "TYPE_INT64", "[ -1 ]", "true"))
    if bundle.manifest.network.low_res_size is not None:
        inputs.append(("low_res", *pixels, "false"))
    listed = ",\n  ".join(
        f'{{ name: "{tensor}" data_type: {kind} dims: {sizes} optional: {optional} }}'
        for tensor, kind, sizes, optional in inputs
    )
    parameters = "\n".join(
        f'parameters {{ key: "{key}" value {{ string_value: {json_module.dumps(value)} }} }}'
        for key, value in settings.items()
    )
    return f"""name: {json_module.dumps(name)}
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [
  {listed}
]
output [
  {{ name: "images" data_type: TYPE_UINT8 dims: [ -1, -1, -1, -1 ] }},
  {{ name: "step" data_type: TYPE_INT32 dims: [ 1 ] }}
]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
{parameters}
"""
