"""Does a contrastive loss help? Heads on frozen features of made-up responses: ``python -m saekit_quality.experiment --out DIR``.

For each seed dialogues of its own are made up, divided into training, validation and test; for each noise of the votes and each
number of labelled responses, heads are trained by BCE against hard and soft targets, each without and with a contrastive loss, and
with one whose pairs are shuffled. Pairs go by the majority beside hard targets, and by agreement beside soft ones. All arms of a
seed have the same first weights, and the same batches in the same order. The weight of the contrastive loss (which the shuffled
pairs share) and the step that is kept are chosen on validation responses; figures are of test responses.

Printed are the mean macro AUROC with the share that it reaches of the ceiling's lead over chance, and paired differences with the
95% interval of Student's t over seeds, whose data are independent.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saekit import UsageError, organism, write_json
from saekit_quality.calibration import fit_temperatures, sigmoid
from saekit_quality.data import QualityData, split
from saekit_quality.experiment_table import as_markdown
from saekit_quality.frozen import frozen_features
from saekit_quality.generator import MOST_NOISE, ceiling_probabilities, generate
from saekit_quality.heads import HeadSettings, Trained, train_head
from saekit_quality.metrics import macro_auroc, measure
from saekit_quality.pairs import Rule
from saekit_quality.votes import Floats, Targets, hard_targets

RESPONSES = 4  # to each dialogue
VALIDATION, TEST = 32, 125  # dialogues
PAIRS: dict[Targets, Rule] = {"hard": "majority", "soft": "agreement"}
"""By which rule responses are pairs, beside BCE against these targets."""


def run_cell(
    features: dict[str, Floats],
    data: dict[str, QualityData],
    labels: int,
    *,
    weights: Sequence[float],
    seed: int,
    settings: HeadSettings,
) -> dict[str, Any]:
    """The test figures of every arm of one seed, noise and number of labels. features and data: train, validation, test."""
    votes = data["train"].votes[:labels]
    validation = features["validation"], data["validation"].votes
    results: dict[str, Any] = {"ceiling": ceiling(data["test"])}

    def trained(kind: Targets, weight: float, shuffled: bool = False) -> Trained:
        return train_head(
            features["train"][:labels], votes, validation,
            targets=kind, weight=weight, pairs=PAIRS[kind], shuffled=shuffled, seed=seed, settings=settings,
        )  # fmt: skip

    for kind in PAIRS:
        results[kind] = test_figures(trained(kind, 0.0), features, data)
        best, weight = max(((trained(kind, w), w) for w in weights), key=lambda pair: pair[0].validation)
        results[f"{kind}_contrast"] = {**test_figures(best, features, data), "weight": weight}
        results[f"{kind}_shuffled"] = test_figures(trained(kind, weight, shuffled=True), features, data)
    return results


def test_figures(found: Trained, features: dict[str, Floats], data: dict[str, QualityData]) -> dict[str, Any]:
    """Macro AUROC, and macro ECE as it is and after temperature scaling, each temperature fitted on validation responses."""
    labels = {part: hard_targets(data[part].votes) for part in ("validation", "test")}
    logits, _ = found(features["test"])
    temperatures = fit_temperatures(found(features["validation"])[0], labels["validation"], data["test"].criteria)
    plain, scaled = _figures(sigmoid(logits), labels["test"], data["test"]), temperatures.probabilities(logits)
    return {**plain, "scaled_ece": _figures(scaled, labels["test"], data["test"])["ece"], "step": found.step}


def ceiling(test: QualityData) -> dict[str, Any]:
    """The same figures of the true probabilities."""
    return _figures(ceiling_probabilities(test, "hard"), hard_targets(test.votes), test)


def _figures(probabilities: Floats, labels: Floats, data: QualityData) -> dict[str, Any]:
    found = measure(probabilities, labels, data.dialogues, data.criteria, resamples=0)
    criteria = {name: of["auroc"].value for name, of in found.criteria.items()}
    return {"auroc": macro_auroc(probabilities, labels), "ece": found.macro["ece"].value, "criteria": criteria}


def features_of(data: QualityData, encoder: str, layers: int | None, pooling: Any, cache: Path) -> Floats:
    """Frozen features of all responses, kept in `cache`. They depend on texts alone, so they are the same at every noise."""
    if cache.is_file():
        return np.load(cache)
    from transformers import AutoModel, AutoTokenizer

    fewer = {} if layers is None else {"num_hidden_layers": layers}
    try:
        model, tokenizer = AutoModel.from_pretrained(encoder, **fewer).eval(), AutoTokenizer.from_pretrained(encoder)
    except (OSError, ValueError) as error:
        raise UsageError(f"--encoder {encoder}: cannot be loaded: {str(error).splitlines()[0]}") from None
    found = frozen_features(data, model, tokenizer, pooling=pooling)
    np.save(cache, found)
    return found


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry for each seed, noise and number of labels, written to results.json as they come. A run that was stopped goes on
    with those that are not there yet. UsageError if results.json is of other options."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = HeadSettings(steps=options.steps)
    dialogues = -(-max(options.labels) // RESPONSES)
    total = dialogues + VALIDATION + TEST
    shares = {"train": dialogues / total, "validation": VALIDATION / total, "test": TEST / total}
    found = earlier(out / "results.json", vars(options))
    there = {(entry["seed"], entry["noise"], entry["labels"]) for entry in found}
    for seed in range(options.seeds):
        if there >= set(itertools.product([seed], options.noise, options.labels)):
            continue
        x: dict[str, Floats] | None = None
        for noise in options.noise:
            data = generate(total, responses=RESPONSES, noise=noise, seed=seed)
            if x is None:
                cache = out / f"features-{seed}-{options.layers or 'all'}-{options.pooling}-{total}.npy"
                whole = features_of(data, options.encoder, options.layers, options.pooling, cache)
                row = {key: i for i, key in enumerate(zip(data.dialogues, data.responses, strict=True))}
                x = {
                    name: whole[[row[key] for key in zip(part.dialogues, part.responses, strict=True)]]
                    for name, part in split(data, shares, seed).items()
                }
                mean, deviation = x["train"].mean(0), x["train"].std(0) + 1e-6
                x = {name: (values - mean) / deviation for name, values in x.items()}
            parts = split(data, shares, seed)
            for labels in options.labels:
                if (seed, noise, labels) in there:
                    continue
                arms = run_cell(x, parts, labels, weights=options.weights, seed=seed, settings=settings)
                found.append({"seed": seed, "noise": noise, "labels": labels, "arms": arms})
                write_json(out / "results.json", {"options": vars(options), "results": found})
    return found


def earlier(path: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a file that a run with the same options has left, which may have had other seeds; none without a file."""
    if not path.is_file():
        return []
    kept = json.loads(path.read_text(encoding="utf-8"))
    for name, value in options.items():
        if name not in ("seeds", "out") and kept["options"].get(name) != value:
            raise UsageError(f"--out: {path} is of a run with --{name} {kept['options'].get(name)}. Give another directory.")
    return [entry for entry in kept["results"] if entry["seed"] < options["seeds"]]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options, checked. Ends the program with a message for a wrong one."""
    parser = argparse.ArgumentParser(prog="python -m saekit_quality.experiment", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", required=True, help="directory of results.json, table.md, and the features")
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--labels", type=int, nargs="+", default=[64, 256, 1024], help="judged responses to train on")
    noises = "mean share of votes that are a coin's"
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.2, 0.4], help=noises)
    weights = "weights of the contrastive loss to choose from"
    parser.add_argument("--weights", type=float, nargs="+", default=[0.1, 0.5], help=weights)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--encoder", default=str(organism.directory()), help="a Hugging Face encoder or decoder")
    parser.add_argument("--layers", type=int, help="how many of its layers are run; all by default")
    parser.add_argument("--pooling", choices=["mean", "last"], default="mean", help="over the response's tokens")
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds: an interval over seeds needs at least 2.")
    if min(options.labels) < 2 or options.steps < 1:
        parser.error("--labels must be at least 2, and --steps at least 1.")
    if any(not 0 <= noise <= MOST_NOISE for noise in options.noise):
        parser.error(f"--noise must be 0 to {MOST_NOISE}.")
    if min(options.weights) <= 0:
        parser.error("--weights must be above 0; the arms without a contrastive loss are there anyway.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the tables, and write them."""
    options = parse(arguments)
    torch.set_num_threads(1)  # heads are so small that threads would wait for one another
    try:
        table = as_markdown(run(options))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table)
    (Path(options.out) / "table.md").write_text(table + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
