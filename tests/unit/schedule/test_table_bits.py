"""Tables of DDPM and DDIM have the bits that they had before other solvers came (commit 5498c84)."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from admtrt.config import DiffusionConfig
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import UPDATE, sampling_schedule

TABLES = {
    "linear eps learned_range ddpm 20 0.0 True": "963327264e05c9d01bd45f22b98a61a2",
    "linear eps learned_range ddim ddim25 0.0 True": "4d954bb8c946574a734046406a7d4709",
    "linear eps learned_range ddim 10 0.5 False": "0a3845f5a77707883df4a5c0aceb42e8",
    "linear eps learned_range ddpm 90,60,60,20,20 0.0 False": "aa5345305f27759c15618557f0fe66d3",
    "linear x_0 fixed_small ddpm 20 0.0 True": "2cfbdd04a855ae319f89eddb9c824e5a",
    "linear x_0 fixed_small ddim ddim25 0.0 True": "87347f89ca98b4cc578f457f1780bd91",
    "linear x_0 fixed_small ddim 10 0.5 False": "246c8dfc45f94bacbd12ae87d84db45b",
    "linear x_0 fixed_small ddpm 90,60,60,20,20 0.0 False": "3cba7e396f84e9fc189d8a404ea3b040",
    "cosine eps fixed_large ddpm 20 0.0 True": "96dc1ef287be23924bf798d4b3b4182b",
    "cosine eps fixed_large ddim ddim25 0.0 True": "37b5fd36cef3f6430394290b5ea43f65",
    "cosine eps fixed_large ddim 10 0.5 False": "59b516d952e3f18297be190b85f84890",
    "cosine eps fixed_large ddpm 90,60,60,20,20 0.0 False": "79dfe1cdb4811998470718fa47bb7038",
    "linear previous_x learned ddpm 20 0.0 True": "cbc7685a04eab311f962f7415d3e32f1",
    "linear previous_x learned ddim ddim25 0.0 True": "6b4b874ae0766b413677508203dcc589",
    "linear previous_x learned ddim 10 0.5 False": "1122c70604edf81109bb8f70786a81d2",
    "linear previous_x learned ddpm 90,60,60,20,20 0.0 False": "79189c47bc6bad42b83e1acf23a698c3",
    "cosine x_0 learned_range ddpm 20 0.0 True": "dff86a60b8ea4ef47a593f92a631178d",
    "cosine x_0 learned_range ddim ddim25 0.0 True": "22b1d6c74f846275f58b41192a9c1ebe",
    "cosine x_0 learned_range ddim 10 0.5 False": "1fca4b50a3f59b5651085dd386fd767d",
    "cosine x_0 learned_range ddpm 90,60,60,20,20 0.0 False": "eb3d5dc641a232f2dbff407b90ccd627",
}
"""Half of the SHA-256 of the float32 table by schedule, mean, variance, method, steps, eta and clip."""


@pytest.mark.parametrize("name", TABLES)
def test_bits_are_kept(name: str) -> None:
    schedule, mean, variance, method, steps, eta, clip = name.split()
    process = DiffusionConfig.from_dict({"schedule": schedule, "mean_type": mean, "variance_type": variance})
    sampler = SamplerConfig(method=method, steps=steps, eta=float(eta), clip=clip == "True", scale=2.5)
    table = sampling_schedule(process, sampler).coefficients[:, : len(UPDATE)]
    assert hashlib.sha256(np.ascontiguousarray(table, "<f4").tobytes()).hexdigest()[:32] == TABLES[name]
