"""The `Result` of `atp`: the analysed samples taken together."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from saekit import Result
from saekit_attribution.atp.figures import score_against_exact
from saekit_attribution.atp.sample_analysis import EXACT, AnalysedSample
from saekit_attribution.effects.ranking import by_weight, ranked

LOW = 0.7
"""A median Spearman correlation with the exact effects below this gives a warning, and so does a mean recall."""


def summarise(
    analysed: Sequence[AnalysedSample], skipped: Counter[str], failed: Counter[str], *, top_k: int, recall_at: int
) -> Result:
    """scalars: counts, medians of the fidelity and the mean recall by method, the SAE error's share. tables: ranking,
    ranking_by_template_type, skipped, failed. figures: score against exact effect. notes: what a reader must know."""
    result = Result(
        scalars={
            "samples": len(analysed) + skipped.total() + failed.total(),
            "analysed": len(analysed),
            "skipped": skipped.total(),
            "failed": failed.total(),
        },
        tables={
            "skipped": [{"reason": reason, "samples": n} for reason, n in skipped.most_common()],
            "failed": [{"error": error, "samples": n} for error, n in failed.most_common()],
        },
    )
    if not analysed:
        flagged = skipped.total() + failed.total()
        why = "no variation is flagged" if not flagged else f"all {flagged} flagged variations were skipped or failed"
        result.notes.append(f"Nothing was attributed: {why}.")
        return result
    methods = list(analysed[0].attributions)
    firsts = [a.attributions[methods[0]] for a in analysed]
    result.scalars["logit_diff"] = statistics.fmean(a.logit_diff for a in firsts)
    result.scalars["moved"] = statistics.fmean(a.moved for a in firsts)
    for method in methods:
        result.scalars |= _fidelity(analysed, method, recall_at)
        result.scalars |= _parts(analysed, method)
    result.tables |= _rankings(analysed, methods, top_k)
    if EXACT in methods:
        for method in methods:
            if method != EXACT:
                result.figures[f"{method}_against_exact"] = _figure(analysed, method)
    result.notes += _notes(result.scalars, methods, recall_at)
    if failed:
        of = f"{failed.total()} of {result.scalars['samples']} samples"
        result.notes.append(f"{of} failed; the results file says why, in the place of each.")
    return result


def _fidelity(analysed: Sequence[AnalysedSample], method: str, recall_at: int) -> dict[str, float | None]:
    """Medians over the samples where the correlations are defined, the mean over those where the recall is; nothing for
    the exact effects themselves."""
    if method == EXACT:
        return {}
    found = [a.fidelity(method, recall_at) for a in analysed]
    recalls = [f.recall for f in found if f.recall is not None]
    name = f"{method}_recall_at_{recall_at}"
    return {
        f"{method}_spearman": _median([f.spearman for f in found]),
        f"{method}_pearson": _median([f.pearson for f in found]),
        name: statistics.fmean(recall.share for recall in recalls) if recalls else None,
        f"{name}_by_chance": statistics.fmean(recall.by_chance for recall in recalls) if recalls else None,
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def _parts(analysed: Sequence[AnalysedSample], method: str) -> dict[str, float | None]:
    """The sum of the scores compared with `moved`, the joint effect of all nodes; means over samples.

    completeness_gap: the sum over latents and error, minus `moved`. error_share: the error's score relative to `moved`.
    error_share_absolute: its absolute value relative to the sum of all absolute scores."""
    found = [a.attributions[method] for a in analysed]
    errors, moved = sum(a.error for a in found), sum(a.moved for a in found)
    latents = sum(float(a.scores.sum()) for a in found)
    sizes = sum(float(a.scores.abs().sum()) + abs(a.error) for a in found)
    return {
        f"{method}_completeness_gap": (latents + errors - moved) / len(found),
        f"{method}_error_share": errors / moved if moved else None,
        f"{method}_error_share_absolute": sum(abs(a.error) for a in found) / sizes if sizes else None,
    }


def _rankings(analysed: Sequence[AnalysedSample], methods: list[str], top_k: int) -> dict[str, list[dict[str, Any]]]:
    kinds: dict[str, list[AnalysedSample]] = {}
    for a in analysed:
        kinds.setdefault(a.sample.template_type, []).append(a)
    by_kind = [
        {"template_type": kind, **row} for kind, some in kinds.items() for row in _ranking(some, methods)[:top_k]
    ]
    return {"ranking": _ranking(analysed, methods)[:top_k], "ranking_by_template_type": by_kind}


def _ranking(analysed: Sequence[AnalysedSample], methods: list[str]) -> list[dict[str, Any]]:
    """The latents by the absolute mean score of the first method, with the scores of the others. `weighted`: each score
    times the share of the activation that the base run lacks, so that latents that every answer needs drop out."""
    rankings = {method: ranked([a.attributions[method] for a in analysed]) for method in methods}
    first = rankings.pop(methods[0])
    if methods[0] != EXACT:
        rankings["weighted"] = ranked([by_weight(a.attributions[methods[0]]) for a in analysed])
    others = {
        name: dict(zip(ranking.latents.tolist(), ranking.scores.tolist(), strict=True))
        for name, ranking in rankings.items()
    }
    order = first.scores.abs().argsort(descending=True, stable=True).tolist()
    return [
        {
            "latent": latent,
            "score": float(first.scores[i]),
            "spread": float(first.spread[i]),
            **{name: scores[latent] for name, scores in others.items()},
            "samples": round(float(first.share[i]) * len(analysed)),
            "activation": float(first.activations[i]),
        }
        for i, latent in ((i, int(first.latents[i])) for i in order)
    ]


def _figure(analysed: Sequence[AnalysedSample], method: str) -> dict[str, Any]:
    pairs = [(a.attributions[method], a.attributions[EXACT]) for a in analysed]
    estimates = torch.cat([estimate.scores for estimate, _ in pairs]).tolist()
    exact = torch.cat([truth.scores for _, truth in pairs]).tolist()
    return score_against_exact(method, estimates, exact, [(e.error, t.error) for e, t in pairs])


def _notes(scalars: dict[str, Any], methods: list[str], recall_at: int) -> list[str]:
    notes = []
    if EXACT not in methods:
        notes.append("The exact effects were not computed, so it is unknown how far the scores can be trusted.")
    for method in methods:
        spearman = scalars.get(f"{method}_spearman")
        if spearman is not None and spearman < LOW:
            notes.append(
                f"Fidelity is low: the median Spearman correlation of {method} with the exact effects is {spearman:.2f}, "
                f"below {LOW}. Rank by exact instead."
            )
        recall = scalars.get(f"{method}_recall_at_{recall_at}")
        if recall is not None and recall < LOW:
            chance = scalars[f"{method}_recall_at_{recall_at}_by_chance"]
            notes.append(
                f"Of the {recall_at} latents with the largest exact effects, {method} has {recall:.0%} among its own first "
                f"{recall_at} (by chance {chance:.0%}). Rank by exact instead."
            )
        gap, moved = scalars[f"{method}_completeness_gap"], scalars["moved"]
        if abs(gap) > abs(moved) / 2:
            notes.append(
                f"The scores of {method}, the error's included, add up to {moved + gap:.2f} logits, but all nodes together "
                f"carry {moved:.2f}: the scores say what each latent does alone, not what many do together."
            )
    judge = EXACT if EXACT in methods else methods[0]
    shares = [scalars[f"{judge}_{name}"] for name in ("error_share", "error_share_absolute")]
    if any(share is not None and share > 0.5 for share in shares):
        signed, absolute = ("undefined" if share is None else f"{share:.0%}" for share in shares)
        notes.append(
            f"The SAE's error carries much of the effect, which no latent explains ({signed} of what all nodes carry "
            f"together, {absolute} of the sum of absolute scores, by {judge}): use a better dictionary or another site."
        )
    return notes
