"""The JSON of one strength: the fields of a feature-steering log, and the same for every prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from saekit import RunContext, Subject
from saekit_steering.activation_statistics import ActivationStatistics
from saekit_steering.cluster import Cluster
from saekit_steering.continuations import Continuation
from saekit_steering.prompts import Prompt
from saekit_steering.scoring import Scored
from saekit_steering.steering_vectors import SteeringVector


def layer_of(subject: Subject) -> int | str:
    """The layer number in the hook point's name; if it has none, the name reduced to letters allowed in file names."""
    number = re.search(r"\d+", subject.site.name)
    return int(number[0]) if number else re.sub(r"\W+", "-", subject.site.name).strip("-") or "model"


def fixed_rows(context: RunContext) -> int:
    """The number of decoder rows fixed to concept vectors; 0 for an architecture without any."""
    options = context.sae.options()
    return len(options.get("latents") or ()) if "fixed_vectors" in options else 0


def steering_log(
    context: RunContext,
    cluster: Cluster,
    neighbours: int,
    statistics: ActivationStatistics,
    prompts: Sequence[Prompt],
    scored: Scored,
    vector: SteeringVector,
    number: int,
    written: Sequence[Continuation],
) -> dict[str, Any]:
    """The content of `L{layer}_S{strength}.json`: the log's fields for the first prompt, and under `saekit` the strength in
    other units and, for every prompt, f and g by position and the texts."""
    subject = context.source.subject
    cases = [_case(context, prompts, scored, number, i, written) for i in range(len(prompts))]
    stats = {"indices": cluster.latents, **cases[0]["pooled"]}
    return {
        "model": context.source.peek().get("model", subject.name),
        "layer_idx": layer_of(subject),
        "sae": {"input_dim": context.sae.d_in, "sae_dim": context.sae.d_sae, "fixed_v_cnt": fixed_rows(context)},
        "gnn": {"use_gnn": cluster.graph is not None, "top_k": neighbours if cluster.graph is not None else 0},
        "steering": {"feature_idx": vector.row, "strength": vector.strength.absolute},
        "prompt": cases[0]["prompt"],
        "output": cases[0]["outputs"].get("greedy", {"before": None, "after": None}),
        "feature_stats": stats,
        "feature_std_summary": {"mean_std": float(statistics.std.mean()), "max_std": float(statistics.std.max())},
        "saekit": {
            "hook_point": subject.site.name,
            "strength": {
                "given": vector.strength.given,
                "unit": vector.strength.unit,
                "absolute": vector.strength.absolute,
                "norm": vector.strength.norm,
            },
            "graph": None if cluster.graph is None else cluster.graph.builder,
            "prompts": cases,
        },
    }


def _case(
    context: RunContext,
    prompts: Sequence[Prompt],
    scored: Scored,
    number: int,
    at: int,
    written: Sequence[Continuation],
) -> dict[str, Any]:
    """One prompt: its outputs, and f and g before and after, pooled and by token."""
    import torch

    prompt = prompts[at]
    before, after = scored.readings_before[at], scored.readings[number][at]
    by_token = {
        f"{name}_{when}": None if values is None else values.tolist()
        for when, pair in (("before", before), ("after", after))
        for name, values in zip("fg", pair, strict=True)
    }
    return {
        "kind": prompt.kind,
        "prompt": prompt.text,
        "outputs": {
            one.sampling: {"before": one.pair.before, "after": one.pair.after}
            for one in written
            if one.prompt is prompt and one.vector == number
        },
        "tokens": context.source.token_strings(torch.tensor(prompt.tokens[1:])),
        "pooled": {
            f"{name}_{when}": _pooled(values)
            for name, place in (("f", 0), ("g", 1))
            for when, values in (("before", before[place]), ("after", after[place]))
        },
        "by_token": by_token,
    }


def _pooled(values: Tensor | None) -> list[float] | None:
    """The mean over a prompt's positions, [T - 1, m] -> [m]."""
    return None if values is None else values.double().mean(0).tolist()
