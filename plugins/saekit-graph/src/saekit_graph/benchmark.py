"""What building a graph costs: ``python -m saekit_graph.benchmark [cosine|coactivation|correlation|pmi] [--out card.json]``.

cosine: the top 32 of a random dictionary of 131,072 latents x 768. The time is compared with that of the matrix products
alone, over the same blocks; some rows are enough, since every block of rows costs the same. ``--whole`` builds the whole
graph and gives the peak memory of that. The others: 1M activations of 32 latents each out of 16,384, some of which fire
far more often than others.

Peaks are those of the whole process, Python, torch and the SAE included (`ru_maxrss`), so measure one builder at a time.
"""

from __future__ import annotations

import argparse
import itertools
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit import Code, Pattern, Registry, SparseAutoencoder, SparseCode, write_json
from saekit_graph.cosine import BLOCK, Cosine, cosine_blocks
from saekit_graph.top_k_graph import rows_in_a_block, top_k_graph

ACTIVE = 32  # latents of each activation
BATCH = 4096


def random_sae(d_in: int, d_sae: int, device: str = "cpu") -> SparseAutoencoder:
    """A dictionary of random directions, made in place: initialising it as training does would be the peak of memory."""
    sae: SparseAutoencoder = Registry().find("architecture", "topk").build({"k": ACTIVE}, d_in, d_sae, None)
    with torch.no_grad():
        sae.W_enc.zero_()  # it occupies memory, though nothing reads it
        sae.W_dec.normal_(generator=torch.Generator().manual_seed(0))
        sae.constrain_weights()
    return sae.to(device)


def random_codes(tokens: int, d_sae: int) -> Iterator[Code]:
    """Codes of `ACTIVE` latents, one from each stratum, so that none occurs twice; the first of a stratum are frequent."""
    draws = torch.Generator().manual_seed(0)
    size = d_sae // ACTIVE
    firsts = torch.arange(ACTIVE) * size
    for start in range(0, tokens, BATCH):
        n = min(BATCH, tokens - start)
        u = torch.rand(n, ACTIVE, generator=draws)
        latents = firsts + (size * u**3).long().clamp_max(size - 1)
        values = torch.rand(n * ACTIVE, generator=draws)
        yield SparseCode(Pattern.regular(latents, d_sae), values)


def of_cosine(d_sae: int, d_in: int, k: int, rows: int, rounds: int, whole: bool, device: str) -> dict[str, Any]:
    """Seconds of the builder and of its products alone on `rows` rows of the dictionary, and of the whole graph if `whole`."""
    sae = random_sae(d_in, d_sae, device)
    W = sae.W_dec.detach()
    size = rows_in_a_block(d_sae, BLOCK)
    blocks = max(1, math.ceil(rows / size))
    inverse = 1 / W.norm(dim=1)

    def products() -> None:
        space = W.new_empty(size, d_sae)  # as the builder does
        for first in range(0, min(blocks * size, d_sae), size):
            some = W[first : first + size]
            torch.mm(some, W.t(), out=space[: len(some)])

    def building() -> None:
        top_k_graph(sae, itertools.islice(cosine_blocks(W, inverse), blocks), k=k)

    seconds: dict[str, list[float]] = {"products": [], "building": []}
    for _ in range(rounds):  # in turns, so that both see the same load
        seconds["products"].append(_timed(products, device))
        seconds["building"].append(_timed(building, device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    card: dict[str, Any] = {
        "rows": min(blocks * size, d_sae),
        "products_seconds": medians["products"],
        "building_seconds": medians["building"],
        "times_the_products": medians["building"] / medians["products"],
    }
    if whole:
        card["whole_seconds"] = _timed(lambda: Cosine(k=k)(sae, iter(())), device)
        card["whole_times_the_products"] = card["whole_seconds"] / (medians["products"] * d_sae / card["rows"])
    return card


def of_joint(name: str, d_sae: int, tokens: int, k: int) -> dict[str, Any]:
    """Seconds to read the codes (generated as they are read) and to build their graph."""
    sae = random_sae(8, d_sae)
    builder = Registry().find("graph_builder", f"graph.{name}").build({"k": k})
    drawing = _timed(lambda: sum(len(code) for code in random_codes(tokens, d_sae)), "cpu")
    edges: list[Tensor] = []
    seconds = _timed(lambda: edges.append(builder(sae, random_codes(tokens, d_sae)).edge_index), "cpu")
    return {"tokens": tokens, "seconds": seconds - drawing, "seconds_to_draw_the_codes": drawing, "edges": edges[0].shape[1]}


def _timed(work: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print or write the figures."""
    parser = argparse.ArgumentParser(description="What building a feature graph costs.")
    parser.add_argument("builder", nargs="?", default="cosine", choices=("cosine", "coactivation", "correlation", "pmi"))
    parser.add_argument("--latents", type=int, help="width of the dictionary")
    parser.add_argument("--width", type=int, default=768, help="width of the activations, for cosine")
    parser.add_argument("--k", type=int, default=32, help="neighbours")
    parser.add_argument("--rows", type=int, default=2048, help="rows of the dictionary that cosine is timed on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="build the whole graph of cosine too")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="number of activations, for the others")
    parser.add_argument("--device", default="cpu", help="for cosine")
    parser.add_argument("--out", type=Path, help="a file for the figures")
    asked = parser.parse_args(arguments)
    if asked.builder == "cosine":
        asked.latents = asked.latents or 131_072
        card = of_cosine(asked.latents, asked.width, asked.k, asked.rows, asked.rounds, asked.whole, asked.device)
    else:
        asked.latents = asked.latents or 16_384
        card = of_joint(asked.builder, asked.latents, asked.tokens, asked.k)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux gives KiB
    card = {"builder": asked.builder, "latents": asked.latents, "k": asked.k, **card, "peak_bytes": peak}
    card |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": asked.device}
    if asked.device != "cpu":
        card["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    if asked.out:
        write_json(asked.out, card)
    for key, value in card.items():
        print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")


if __name__ == "__main__":
    main()
