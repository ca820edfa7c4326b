"""A made-up run directory: everything that a finished run leaves for the report, without training anything."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

LOSSES = {"mse": 1.0, "auxk": 0.03125, "hoyer": 0.002}


def history(steps: int = 488, every: int = 4) -> list[dict]:
    """Logged lines that look like training: losses fall, dead latents appear and are revived."""
    lines = []
    for step in range(every - 1, steps, every):
        done = step / steps
        wobble = math.sin(step * 1.7) * math.exp(-2 * done)
        raw = {
            "mse": 0.9 * math.exp(-5 * done) + 0.09 + 0.03 * wobble,
            "auxk": 0.8 * math.exp(-3 * done) + 0.3 + 0.05 * wobble,
            "hoyer": 31 - 9 * done + wobble,
        }
        weights = {**LOSSES, "hoyer": LOSSES["hoyer"] * min(1.0, done * 3)}
        line = {"step": step, "tokens": (step + 1) * 2048, "seconds": round(0.12 * step, 2)}
        line["loss"] = sum(raw[name] * weights[name] for name in raw)
        line |= {f"loss/{name}": value for name, value in raw.items()}
        line |= {f"weight/{name}": value for name, value in weights.items()}
        line["explained_variance"] = 1 - raw["mse"]
        line["l0"] = 32 + 3 * wobble
        line["dead"] = max(0.0, 420 * math.sin(math.pi * done) ** 2)
        line["lr"] = 1e-3 * min(1, 10 * done, 5 * (1 - done))
        line["grad_norm"] = 0.4 + 0.3 * abs(wobble)
        line["tokens_per_second"] = 16_300.0 + 900 * wobble
        line["gate_temperature"] = 2.0 - done
        lines.append(line)
    return lines


def summary(directory: Path) -> dict:
    """The document of a finished run."""
    return {
        "run": "2026-11-20-quickstart-3f2a",
        "recipe": "quickstart",
        "directory": str(directory),
        "model": "organism",
        "hook_point": "blocks.2.hook_out",
        "sae": {"architecture": "topk", "d_in": 256, "d_sae": 4096},
        "metrics": {
            "explained_variance": 0.9134,
            "fvu": 0.0866,
            "mse": 0.0913,
            "l0": 32.0,
            "density_median": 0.00047,
            "dead_fraction": 0.0024,
            "ce_recovered": 0.9512,
            "probe_score": None,
        },
        "headline": ["explained_variance", "l0", "dead_fraction", "ce_recovered", "probe_score"],
        "analysis": {
            "features": {"latents_shown": 2, "median_density": 0.0004},
            "steer": {"shift": None, "strength": 15.0},
        },
        "losses": {"mse": 0.0935, "auxk": 0.3321, "hoyer": 22.1},
        "tokens": 999_424,
        "steps": 488,
        "seconds": {"prepare": 4.1, "harvest": 12.8, "train": 48.4, "evaluate": 6.2, "analyse": 9.9, "report": 0.9},
        "tokens_per_second": 16_331.2,
        "peak_memory_bytes": 1_288_490_188,
        "plugins": [
            {"name": "builtin", "distribution": "saekit", "version": "0.1.0"},
            {"name": "hoyer", "distribution": "saekit-hoyer", "version": "0.3.1"},
        ],
        "warnings": ["loss 'auxk': had nothing to say in 12 of 488 steps, since no latent was dead."],
    }


def features_result() -> dict:
    """What the `features` analyzer leaves."""
    texts = {
        17: [
            "def",
            " forward",
            "(",
            "self",
            ",",
            " x",
            ")",
            ":",
            "\n",
            "    return",
            " self",
            ".",
            "lin",
            "(",
            "x",
            ")",
        ],
        2301: ["I", " really", " like", " the", " argument", " that", " rivers", " should", " be", " public", "."],
    }
    examples = []
    for latent, tokens in texts.items():
        for rank in range(4):
            peak = (rank * 3 + 4) % len(tokens)
            activations = [round(max(0.0, 5.2 - rank - 1.7 * abs(i - peak)), 3) for i in range(len(tokens))]
            examples.append(
                {
                    "latent": latent,
                    "rank": rank,
                    "activation": max(activations),
                    "before": "".join(tokens[:peak]),
                    "token": tokens[peak],
                    "after": "".join(tokens[peak + 1 :]),
                    "tokens": tokens,
                    "activations": activations,
                }
            )
    latents = [
        {"latent": 17 + 12 * i, "density": 0.0212 / (i + 1), "max_activation": 5.2 - i / 20, "mean_activation": 1.3}
        for i in range(60)
    ] + [{"latent": 2301, "density": 0.0009, "max_activation": 5.2, "mean_activation": None}]
    x = [i / 10 for i in range(60)]
    return {
        "scalars": {"latents_shown": 2, "median_density": 0.0004},
        "tables": {"examples": examples, "latents": latents},
        "figures": {
            "Density of latents": {
                "data": [
                    {"type": "bar", "x": x, "y": [math.exp(-((v - 2.4) ** 2)) * 300 for v in x], "name": "latents"}
                ],
                "layout": {
                    "xaxis": {"title": {"text": "-log10 density"}},
                    "template": {"layout": {"paper_bgcolor": "white"}},
                },
            }
        },
        "files": ["latents.csv"],
        "notes": ["Contexts come from 100,000 held-out tokens; a latent that fires less often has fewer examples."],
    }


def steer_result() -> dict:
    """A null result with its reason, and a figure with a title of its own."""
    strengths = [-30, -15, 0, 15, 30]
    return {
        "scalars": {"shift": None, "strength": 15.0, "pairs": 64},
        "tables": {
            "generations": [{"strength": s, "text": f"The argument is sound ({s}).", "praise": 0.5} for s in strengths]
        },
        "figures": {
            "Praise against strength": {
                "data": [
                    {
                        "type": "scatter",
                        "mode": "lines+markers",
                        "x": strengths,
                        "y": [0.1, 0.2, 0.4, 0.7, 0.8],
                        "name": "steered",
                    },
                    {
                        "type": "scatter",
                        "mode": "lines+markers",
                        "x": strengths,
                        "y": [0.4] * 5,
                        "name": "random latent",
                    },
                ],
                "layout": {"title": {"text": "Share of praise in 64 paired generations"}},
            },
            "Logit shift": {"data": [{"type": "heatmap", "z": [[0, 1, 2], [2, None, 1]]}], "layout": {}},
        },
        "files": [],
        "notes": ["The effect is within the range of random latents: no evidence that this latent steers sycophancy."],
    }


def make_run(directory: Path) -> Path:
    """Write the whole directory."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(line) for line in history()]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n" + lines[-1][:40])
    (directory / "summary.json").write_text(json.dumps(summary(directory)))
    (directory / "run.toml").write_text(
        'recipe = "quickstart"\n\n[source]\nuse = "organism"\nhook_point = "blocks.2.hook_out"\n\n[architecture]\n'
        'use = "topk"\nd_sae = 4096\nk = 32\n\n[[loss]]\nuse = "mse"\n\n[[loss]]\nuse = "auxk"\nweight = 0.03125\n'
    )
    provenance = {
        "saekit": "0.1.0",
        "seed": 0,
        "libraries": {"torch": "2.13.0", "sae_lens": None},
        "command": ["saekit", "run", "quickstart"],
        "source": {"model": "organism", "sha256": "9f2c" * 16},
    }
    (directory / "provenance.json").write_text(json.dumps(provenance))
    for name, result in (("features", features_result()), ("steer", steer_result())):
        home = directory / "analysis" / name
        home.mkdir(parents=True, exist_ok=True)
        (home / "result.json").write_text(json.dumps(result))
    (directory / "analysis" / "features" / "latents.csv").write_text("latent\n17\n")
    return directory


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A finished run."""
    return make_run(tmp_path / "2026-11-20-quickstart-3f2a")
