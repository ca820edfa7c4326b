"""What an embedding looks like: alignment and uniformity (Wang and Isola 2020), and a picture before and after training."""

from __future__ import annotations

from typing import Any

import numpy as np

from saekit import UsageError
from saekit_quality.votes import Floats

_TILE = 1 << 22  # distances held at a time
MOST_POINTS = 2000


def alignment(z: Floats, labels: Floats) -> dict[str, float | None]:
    """The mean squared distance of pairs of responses with the same label (eq. 1, alpha = 2), and of all pairs as the control.

    z: [n, d], scaled to norm 1 here. labels: [n], 0, 1 or NaN (left out). "yes" and "no": pairs within that label; "same": both,
    each pair weighing the same; "all": any two with a label. An embedding that says nothing of the criterion has the same for
    all. None where there is no pair.
    """
    known = ~np.isnan(labels)
    z, labels = _directions(z)[known], labels[known]
    parts = {"yes": z[labels > 0.5], "no": z[labels <= 0.5], "all": z}
    sums = {name: _sum_of_squares(part) for name, part in parts.items()}
    pairs = {name: len(part) * (len(part) - 1) / 2 for name, part in parts.items()}
    found = {name: sums[name] / pairs[name] if pairs[name] else None for name in parts}
    same = pairs["yes"] + pairs["no"]
    return {**found, "same": (sums["yes"] + sums["no"]) / same if same else None}


def uniformity(z: Floats) -> float | None:
    """log of the mean of exp(-2 |z_i - z_j|^2) over all pairs (eq. 2, t = 2): lower where z fills the sphere more evenly.

    z: [n, d], scaled to norm 1 here. Memory grows with n. None for fewer than two.
    """
    z = _directions(z)
    n = len(z)
    if n < 2:
        return None
    total, step = 0.0, max(1, _TILE // n)
    for start in range(0, n, step):
        squares = 2 - 2 * z[start : start + step] @ z.T
        total += float(np.exp(-2 * squares).sum())
    return float(np.log((total - n) / (n * (n - 1))))


def embedding_figure(
    embeddings: dict[str, Floats], labels: Floats, criterion: str, *, seed: int = 0
) -> dict[str, Any]:
    """A plotly figure: the same responses in each embedding, coloured by one criterion.

    embeddings: by name, such as "before" and "after": [n, d] each. labels: [n], 0 to 1, as the share of yes; NaN is left out. Each
    embedding is shown on its own first two principal components. Of more than `MOST_POINTS` responses as many are drawn at random.

    What this shows depends on the two directions with the most variance; the metrics do not. UsageError for fewer than three
    responses with a label.
    """
    from sklearn.decomposition import PCA  # slow to import

    rows = np.flatnonzero(~np.isnan(labels))
    if len(rows) < 3:
        raise UsageError(f"embedding_figure: {criterion!r} has {len(rows)} labelled responses; a picture needs three.")
    if len(rows) > MOST_POINTS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MOST_POINTS, replace=False))
    title = f"The embedding of the same {len(rows)} responses, by {criterion}"
    layout: dict[str, Any] = {"title": {"text": title}, "showlegend": False}
    traces = []
    width = 1 / len(embeddings)
    for number, (name, z) in enumerate(embeddings.items()):
        two = PCA(2, svd_solver="full").fit(z[rows])
        points, axis = two.transform(z[rows]), "" if number == 0 else str(number + 1)
        shares = two.explained_variance_ratio_
        traces.append({
            "type": "scatter", "mode": "markers", "name": name,
            "x": points[:, 0].round(4).tolist(), "y": points[:, 1].round(4).tolist(),
            "xaxis": f"x{axis}", "yaxis": f"y{axis}", "text": [f"share of yes {value:.2f}" for value in labels[rows]],
            "marker": {
                "color": labels[rows].round(3).tolist(), "cmin": 0, "cmax": 1, "colorscale": "RdBu", "size": 4, "opacity": 0.7,
                "showscale": number == len(embeddings) - 1, "colorbar": {"title": {"text": "yes"}},
            },
        })  # fmt: skip
        layout[f"xaxis{axis}"] = {
            "title": {"text": f"{name}: component 1 ({shares[0]:.0%} of the variance)"},
            "domain": [number * width, (number + 0.88) * width],
        }
        layout[f"yaxis{axis}"] = {"title": {"text": f"component 2 ({shares[1]:.0%})"}, "anchor": f"x{axis}"}
    return {"data": traces, "layout": layout}


def _directions(z: Floats) -> Floats:
    z = np.asarray(z, dtype=np.float64)
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)


def _sum_of_squares(z: Floats) -> float:
    """The sum of |z_i - z_j|^2 over pairs i < j, without the pairs: n sum |z_i|^2 - |sum z_i|^2."""
    return float(len(z) * np.square(z).sum() - np.square(z.sum(0)).sum())
