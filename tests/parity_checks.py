"""What the tests of `lfm2cpp parity` share: the model, the prompt, who runs, and the check itself."""

from __future__ import annotations

import json
from contextlib import contextmanager, nullcontext
from unittest import mock

import numpy as np

from lfm2cpp import reference
from lfm2cpp.parity.report import table
from lfm2cpp.parity.run import Request, check_parity
from lfm2cpp.parity.runners import EngineRunner, ReferenceRunner

SHAPE = dict(n_layer=4, attention=(2,), seed=5)
IDS = [1, 40, 279, 272, 14, 200, 61, 61, 284, 3, 150, 99]
Q4_0 = {"token_embd": "Q6_K", "ffn_down": "Q4_1", ".": "Q4_0"}  # llama-quantize's mix


class FaultyRunner:
    """A runner whose code, not whose weights, is wrong: functions of the reference are replaced while it runs."""

    label = "faulty"

    def __init__(self, runner, fault=None):
        self.runner, self.hparams, self.fault = runner, runner.hparams, fault

    def evaluate(self, tokens):
        with mock.patch.multiple(reference, **self.fault) if self.fault else nullcontext():
            return self.runner.evaluate(tokens)

    def reset(self):
        self.runner.reset()


@contextmanager
def reference_runner(path, fault=None, kind=FaultyRunner, **_):
    yield kind(ReferenceRunner(reference.load_model(path)), fault)


def check(hf, gguf=None, runner=EngineRunner, **options):
    report = check_parity(Request(hf, gguf, **{"ids": IDS, "n_decode": 4, **options}), runner=runner)
    table(report)  # whatever was found can be shown
    json.dumps(report.to_json(), allow_nan=False)
    return report


def swap_b_and_c(name, weights):
    n = len(weights[name]) // 3
    weights[name][: 2 * n] = np.concatenate([weights[name][n : 2 * n], weights[name][:n]])
