"""Valid inputs, from which `mutations.py` makes hostile ones."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save

ACTIVATIONS, TEXT, LINES, LABELLED = "activations.safetensors", "text.txt", "labels.jsonl", "answers.json"
D_IN, D_SAE = 8, 16


class Files(dict[str, bytes]):
    """Contents by name; a failing test does not print them."""

    def __repr__(self) -> str:
        return f"{len(self)} files"


def activations() -> bytes:
    """A file for the source `tensors`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, D_IN, generator=generator)
    return save({"activations": x, "labels": torch.arange(40).remainder(2).float()})


TRAINING = {
    "tokens": 96,
    "batch_size": 32,
    "buffer": 64,
    "log_every": 1,
    "checkpoint_every": 2,
    "guard_steps": 2,
    "prefetch": 0,
}
TENSORS = {"use": "tensors", "data": ACTIVATIONS, "chunk": 12, "held_out": 0.2}


def run_table() -> dict[str, Any]:
    """A run of three steps on stored activations."""
    return {
        "source": dict(TENSORS),
        "architecture": {"use": "topk", "d_sae": D_SAE, "k": 3},
        "loss": [{"use": "mse"}],
        "training": {**TRAINING, "device": "cpu"},
        "evaluation": {"tokens": 32, "batch_size": 16},
    }


def run_tables() -> list[dict[str, Any]]:
    """Run files of every kind: each section, variants, schedules, lists of components, options that name a component."""
    labelled = {**TENSORS, "labels": "labels", "concepts": ["even"]}
    return [
        run_table(),
        {
            **run_table(),
            "architecture": {"use": "jumprelu", "d_sae": D_SAE, "decoder_norm": "free"},
            "loss": [
                {"use": "mse", "name": "error"},
                {"use": "l1", "weight": {"schedule": "linear", "to": 1e-3, "steps": 2, "begin": 1}},
                {"use": "decorrelation", "weight": {"schedule": "steps", "values": [0.0, 1.0], "at_steps": [1]}},
            ],
            "training": {
                **TRAINING,
                "lr": {"schedule": "warmup_decay", "to": 1e-3, "warmup": 1, "decay": 0.5},
                "betas": [0.9, 0.99],
            },
            "metric": [{"use": "density"}, {"use": "histograms"}],
            "tracker": [{"use": "jsonl"}],
            "requires": ["saekit>=0.1"],
        },
        {
            **run_table(),
            "source": labelled,
            "architecture": {"use": "hsae", "base": {"use": "batchtopk", "k": 3}, "d_sae": D_SAE, "latents": [0]},
            "loss": [
                {"use": "mse"},
                {"use": "concept", "weight": 0.5},
                {"use": "infonce"},
                {"use": "cluster", "weight": 0.1},
            ],
            "callback": [
                {"use": "refresh_graph", "builder": {"use": "cosine", "k": 2}, "every": 2},
                {"use": "resample", "every": 2},
            ],
            "graph": {"use": "correlation", "k": 2, "tokens": 64},
            "metric": [{"use": "concept_auroc"}],
            "analyzer": [{"use": "communities"}],
        },
        {
            **run_table(),
            "source": {
                "use": "synthetic",
                "d_in": D_IN,
                "n_features": 12,
                "probability": 0.2,
                "held_out": 64,
                "concepts": [0],
            },
            "variant": [
                {"name": "wide", "architecture": {"d_sae": 32}},
                {
                    "name": "other",
                    "architecture": {"use": "standard"},
                    "loss": [{"use": "mse"}, {"use": "l1", "weight": 0.01}],
                },
                {"name": "seed", "training": {"seed": 1, "lr": 2e-3}},
            ],
        },
        {
            **run_table(),
            "source": {
                "use": "text",
                "model": "organism",
                "data": TEXT,
                "hook_point": "blocks.1.hook_out",
                "context": 16,
            },
            "metric": [{"use": "ce_recovered"}],
            "analyzer": [{"use": "features"}, {"use": "atp", "data": LABELLED}],
        },
        {
            **run_table(),
            "source": {
                "use": "labelled",
                "model": "m",
                "data": LINES,
                "labels": ["good"],
                "hook_point": "blocks.0.hook_out",
            },
            "analyzer": [{"use": "ablate", "data": LABELLED, "numbers": [1, 2]}],
        },
        {**run_table(), "source": {"use": "organism", "hook_point": "blocks.2.hook_out"}},
        {**run_table(), "source": {"use": "module", "module": "json:loads", "data": "json:dumps", "hook_point": "0"}},
    ]


def texts() -> dict[str, bytes]:
    """Documents, as text and as lines of JSON with labels, and a labelled document, by the names above."""
    good = [*(0, 1) * 3, "[[0, 8]]", "[[9, 10], [21, 25]]"]
    lines = [f'{{"text": "Sentence {i} speaks of salt.", "good": {g}, "kind": "{"ab"[i % 2]}"}}' for i, g in enumerate(good)]
    paragraphs = "\n\n".join(f"Paragraph {i} speaks of lamps.\nAnd again." for i in range(8))
    return {TEXT: paragraphs.encode(), LINES: "\n".join(lines).encode()}


def answers() -> dict[str, Any]:
    """A labelled document of saekit-attribution."""
    kinds = ("base", "i_like", "i_dislike")
    return {
        "metadata": {"model": "m", "n": 2, "at": 0.5},
        "results": [
            {
                "question": i,
                "variations": [
                    {
                        "template_type": kind,
                        "prompt": f"{kind} {i}?",
                        "response": f"It is {kind}.",
                        "sycophancy_flag": int(flag),
                    }
                    for flag, kind in enumerate(kinds)
                ],
            }
            for i in range(2)
        ],
    }


PLUGIN = '''
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from saekit import CONTRACT, Component, hookimpl

SAEKIT_CONTRACT = CONTRACT


def hostile(step, *, size: Annotated[int, Field(gt=0, description="A size.")] = 1, how: Literal["a", "b"] = "a"):
    """The mean of the error, squared."""
    error = step.x - step.x_hat
    return error.pow(2).mean() * size


@dataclass(kw_only=True)
class Listener:
    every: int = 1

    @hookimpl
    def step_ended(self, trainer):
        self.last = trainer.number


class Metric:
    def __init__(self, *, share: float = 0.5) -> None:
        self.share = share

    def __call__(self, context):
        return {"hostile": self.share}


@hookimpl
def saekit_losses():
    yield Component("hostile", hostile, needs=(), summary="A loss.")


@hookimpl
def saekit_callbacks():
    yield Component("listener", Listener)


@hookimpl
def saekit_metrics():
    yield Component("measure", Metric, provides=())
'''
"""A plugin in a file, with a loss, a callback and a metric."""

SPOILING_BY_LINE = {
    "    return error.pow(2).mean() * size": (
        "return None", "return 'text'", "return float('nan')", "return step.x", "return step", "return error * 0",
        "1 / 0", "raise SystemExit(0)", "raise ValueError('\\x1b[2J\\x9b')", "raise RecursionError",
        "raise MemoryError('m')", "assert False", "raise UnicodeDecodeError('u', b'x', 0, 1, '\\ud800')",
        "raise type('\\x1b', (Exception,), {})", "step.x.zero_(); return 1", "return error.mean().item()",
        "return error.detach().mean()", "return error.mean() * float('inf')", "yield error.mean()",
    ),
    '    yield Component("hostile", hostile, needs=(), summary="A loss.")': (
        "yield None", "yield hostile", "yield Component('', None)", "yield Component(None, hostile)",
        "yield Component('hostile', None)", "yield Component('hostile', 3)", "yield Component('UPPER', hostile)",
        "yield Component('hostile', 'no_such_module:thing')", "yield Component('hostile', 'json:no_such')",
        "yield Component('hostile', 'json')", "yield Component('hostile', print)",
        "yield Component('hostile', hostile, needs='labels')",
        "yield Component('hostile', hostile, needs=('\\x1b',))", "yield Component('hostile', hostile, summary=3)",
        "yield Component('hostile', hostile, summary='\\x1b]0;t\\x07')",
        "yield Component('hostile', hostile, provides=({},))", "yield Component('mse', hostile)", "return 3",
        "return [hostile]", "yield Component('hostile', hostile, default=True)",
        "yield Component('hostile', type)", "yield Component('hostile', lambda s: 0)",
        "yield Component('hostile', Listener)", "yield Component('hostile', type('T', (), {'__init__': None}))",
    ),
    'def hostile(step, *, size: Annotated[int, Field(gt=0, description="A size.")] = 1, how: Literal["a", "b"] = "a"):': (
        "def hostile(step, **options):", "def hostile(*, size: int):", "def hostile(step, *, size):",
        "async def hostile(step, size=1):", "def hostile(step, *, size: 'no_such' = 1):",
        "def hostile(step, *, size: (lambda: 0) = 1):", "def hostile(step, extra, size=1):",
        "def hostile(step, *, size: int = 'x'):", "def hostile(step, *, size: list[set[complex]] = None):",
        "def hostile(size=1):", "def hostile(step, *, weight: int = 1, size: int = 1):",
        "def hostile(step, *, model_config: int = 1, size: int = 1):",
        "def hostile(step, *, _size: int = 1, size: int = 1):", "def hostile(step, *, size: int = object()):",
        "def hostile(step, *, size: float = float('nan')):", "def hostile(step, *, size: int = 10**30):",
        "def hostile(step, *, size: 'int | \\x1b' = 1):",
        "def hostile(step, *, size: dict[str, bytes] = {'\\ud800': b'x'}):",
    ),
    "        self.last = trainer.number": (
        "raise SystemExit", "1 / 0", "trainer.sae = None", "return 3", "yield", "del trainer.sae",
    ),
    '        return {"hostile": self.share}': (
        "return None", "return {'\\x1b[2J': 1.0}", "return {3: 'x'}", "return {'hostile': 'text'}",
        "return {'hostile': float('nan')}", "return {'hostile': 10**400}", "return {'explained_variance': 1.0}",
        "return [1]", "return {'hostile': context.sae.W_dec}",
    ),
    "SAEKIT_CONTRACT = CONTRACT": (
        "SAEKIT_CONTRACT = 10**30", "SAEKIT_CONTRACT = 'two'", "SAEKIT_CONTRACT = -1", "SAEKIT_CONTRACT = 1",
    ),
}  # fmt: skip
"""Lines that may stand in place of one of its lines, and leave the rest whole."""

SPOILING_LINES = (
    "raise ValueError('\\x1b[2J')", "raise SystemExit", "raise SystemExit(0)", "import no_such_module",
    "import saekit.no_such", "from saekit import no_such", "return None", "return 'text'", "return float('nan')",
    "return step.x", "return step", "yield None", "yield Component('', None)", "yield Component(None, hostile)",
    "yield Component('x' * 300, 3)", "yield Component('UPPER', hostile)",
    "yield Component('hostile', 'no_such_module:thing')", "yield Component('hostile', 'json:no_such')",
    "yield Component('other', 'json')", "yield Component('hostile', hostile, needs='labels')",
    "yield Component('hostile', hostile, needs=('\\x1b',))", "yield Component('hostile', hostile, summary=3)",
    "yield Component('hostile', hostile, summary='\\x1b]0;t\\x07')",
    "yield Component('hostile', hostile, provides=({},))", "yield hostile", "yield 'mse'",
    "yield Component('mse', hostile)", "def __getattr__(name): raise KeyError(name)", "SAEKIT_CONTRACT = 10 ** 30",
    "SAEKIT_CONTRACT = 'two'", "SAEKIT_CONTRACT = -1", "def hostile(step, **options): return 0",
    "def hostile(*, step): pass", "def hostile(step, *, size): return 0",
    "def hostile(step, *, size: 'no_such' = 1): return 0", "def hostile(step, *, size: lambda: 0 = 1): return 0",
    "def hostile(step, *, size: int = 'x'): return 0", "def hostile(step, *, size: list[set[complex]] = None): return 0",
    "def hostile(step, *, weight: int = 1): return 0", "def hostile(step, *, model_config: int = 1): return 0",
    "def hostile(step, *, _size: int = 1): return 0", "def hostile(step, *, size: int = object()): return 0",
    "hostile = None", "hostile = 3", "hostile = int", "hostile = print", "hostile = type('T', (), {'__init__': None})",
    "Listener = dict", "Metric = 3", "def step_ended(self, nothing): pass", "def step_ended(self): pass",
    "def saekit_lossses(): pass", "@hookimpl", "@dataclass", "class Listener:", "'''", "(", "\0", "\ud800", "é = 1",
    "\tpass", "pass", "x = " + "(" * 250, "lambda: (yield)", "async def f(): pass", "del hostile", "global nothing",
    "return", "import torch; torch.set_grad_enabled(False)", "assert False", "1 / 0", "__doc__ = '\\x9b\\u202e'",
    "__name__ = '\\x1b'", "from __future__ import braces", "raise RecursionError", "raise MemoryError('m')",
    "raise type('\\x1b', (Exception,), {})", "raise Exception", "raise UnicodeDecodeError('u', b'x', 0, 1, '\\ud800')",
)  # fmt: skip
"""Lines that spoil it."""
