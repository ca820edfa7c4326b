"""Attribution against the plain loop that it replaces: ``python -m saekit_attribution.benchmark [--out card.json]``.

The loop is the usual notebook code: one sample at a time, parameters not frozen, a forward pass of the whole model that
unembeds every position, and a dense code with a gradient. Candidates take turns; the result is the ratio of their medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit import (
    Registry,
    SparseAutoencoder,
    Subject,
    TokenBatch,
    UsageError,
    load_sae,
    load_subject,
    organism,
    write_json,
)
from saekit_attribution.effects.attribute import attribute
from saekit_attribution.labelled_data.teacher_forcing import Sample

HOOK_POINT = "blocks.2.hook_out"
Found = tuple[float, list[tuple[int, float]]]
"""(logit difference, [(latent, score), ...]) of a sample."""
INSERTED = 6  # tokens of a stated preference, which is missing from the base prompt


def plain_loop(subject: Subject, sae: SparseAutoencoder, samples: Sequence[Sample], top_k: int = 50) -> list[Found]:
    """(logit difference, ids and scores of the strongest latents) of each sample, as a notebook computes them."""
    found = []
    for sample in samples:
        kept: dict[str, Tensor] = {}

        def through_sae(activation: Tensor, kept: dict[str, Tensor] = kept) -> Tensor:
            target = activation[:, -1]  # [1, d]
            code = sae.encode(target).dense()  # [1, d_sae]
            code.requires_grad_(True)
            code.retain_grad()
            rebuilt = code @ sae.W_dec + sae.b_dec
            kept["code"] = code
            # forward the original activation, backward through the decoder
            out = activation.clone()
            out[:, -1] = rebuilt + (target - rebuilt).detach()
            return out

        subject.model.zero_grad()
        sae.zero_grad()
        with subject.site.replaced(through_sae):
            logits = subject.model(torch.tensor([sample.tokens], device=subject.device)).logits
        metric = logits[0, -1, sample.target] - logits[0, -1, sample.base]
        metric.backward()
        code = kept["code"]
        assert code.grad is not None
        scores = (code.detach() * code.grad)[0]
        top = scores.abs().topk(min(top_k, len(scores))).indices
        found.append((metric.item(), [(int(i), float(scores[i])) for i in top]))
    return found


def random_samples(subject: Subject, n: int, length: int, *, based: bool) -> list[Sample]:
    """`n` texts of `length` random tokens, no two with the same beginning."""
    generator = torch.Generator().manual_seed(0)
    size = length - INSERTED - 3
    middles = torch.randint(2, subject.config.vocab_size, (n, size), generator=generator).tolist()
    tails = torch.randint(2, subject.config.vocab_size, (n, INSERTED + 3), generator=generator).tolist()
    return [_sample([], m, t[:INSERTED], t[INSERTED:], based) for m, t in zip(middles, tails, strict=True)]


def prompt_samples(subject: Subject, n: int, length: int, *, based: bool) -> list[Sample]:
    """The organism's prompts with a stated preference, their arguments cut or joined so that each has `length` tokens."""

    def ids(text: str) -> list[int]:
        return subject.tokenizer(text, add_special_tokens=False)["input_ids"]

    before, after = organism.prompt_for("|", "I really like").split("|")
    neutral = organism.prompt_for("|").split("|")[1]
    kind = organism.samples("train", 12 * n)
    words = [token for sample in kind if sample.template_type == "base" for token in ids(" " + sample.base_text)]
    head = [subject.bos_token_id or 0, *ids(before.rstrip())]
    last = ids(neutral)
    inserted = ids(after)[: -len(last)]
    size = length - len(head) - len(inserted) - len(last)
    if size < 1 or len(words) < n * size:
        raise UsageError(f"--lengths {length}: too short or too long for the organism's prompts. Try 30 to 100.")
    return [_sample(head, words[i * size : (i + 1) * size], inserted, last, based) for i in range(n)]


def _sample(head: list[int], middle: list[int], inserted: list[int], last: list[int], based: bool) -> Sample:
    """based: with a base prompt, which lacks `inserted`; without one, positions are compared with zero."""
    start = len(head) + len(middle)
    tokens = (*head, *middle, *inserted, *last)
    if not based:
        return Sample(tokens, 5, 9, (), (-1,) * len(tokens))
    aligned = (*range(start), *[-1] * len(inserted), *range(start, start + len(last)))
    return Sample(tokens, 5, 9, (*head, *middle, *last), aligned)


def random_sae(subject: Subject, d_sae: int = 2048, k: int = 32) -> SparseAutoencoder:
    """An untrained topk SAE for the site: the cost does not depend on what it has learned."""
    tokens = torch.randint(2, subject.config.vocab_size, (32, 32), generator=torch.Generator().manual_seed(1))
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    sample = subject.activations(TokenBatch(tokens, everywhere, everywhere, torch.arange(32))).flatten(0, 1)
    sae = Registry().find("architecture", "topk").build({"k": k}, sample.shape[1], d_sae)
    sae.initialise(torch.Generator().manual_seed(0), sample.float().cpu())
    return sae.to(subject.device).eval()


def measure(subject: Subject, sae: SparseAutoencoder, kind: str, n: int, length: int, rounds: int) -> dict[str, Any]:
    """Seconds (medians) and ratios at one length. Parameters require gradients in the loop only."""
    samples = KINDS[kind](subject, n, length, based=False)
    based = KINDS[kind](subject, n, length, based=True)

    def loop() -> None:
        for module in (subject.model, sae):
            module.requires_grad_(True)
        try:
            plain_loop(subject, sae, samples)
        finally:
            for module in (subject.model, sae):
                module.requires_grad_(False)
                module.zero_grad()

    seconds = alternated(
        {
            "loop": loop,
            "atp": lambda: attribute(subject, sae, samples),
            "exact": lambda: attribute(subject, sae, samples, methods=["exact"]),
            "atp_with_base_run": lambda: attribute(subject, sae, based),
            "exact_with_base_run": lambda: attribute(subject, sae, based, methods=["exact"]),
        },
        rounds,
        subject.device,
    )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    pairs = {
        "loop_over_atp": ("loop", "atp"),
        "exact_over_atp": ("exact", "atp"),
        "loop_over_atp_with_base_run": ("loop", "atp_with_base_run"),
        "exact_over_atp_with_base_run": ("exact_with_base_run", "atp_with_base_run"),
    }
    ratios: dict[str, Any] = {}
    for name, (upper, lower) in pairs.items():
        each = [a / b for a, b in zip(seconds[upper], seconds[lower], strict=True)]
        ratios[name] = {
            "median": round(medians[upper] / medians[lower], 2),
            "of_a_round": [round(min(each), 2), round(max(each), 2)],
        }
    rounded = {name: round(value, 4) for name, value in medians.items()}
    return {"texts": kind, "samples": n, "tokens": length, "seconds": rounded, "ratios": ratios}


KINDS = {"prompts": prompt_samples, "random": random_samples}


def alternated(
    candidates: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, candidate in candidates.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            candidate()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and with --out write a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m saekit_attribution.benchmark", description=__doc__)
    parser.add_argument("--samples", type=int, default=145)
    parser.add_argument("--lengths", type=int, nargs="+", default=[30, 100], help="tokens of a sample")
    parser.add_argument(
        "--texts",
        nargs="+",
        choices=list(KINDS),
        default=list(KINDS),
        help="the organism's prompts, which begin alike, or random tokens, which do not",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="a Hugging Face directory; the organism by default")
    parser.add_argument("--hook-point", default=HOOK_POINT)
    parser.add_argument("--sae", help="a directory with an SAE of that site; a random topk one by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="write the figures to this JSON file")
    options = parser.parse_args(arguments)
    try:
        found = list(_measured(options))
    except UsageError as error:
        parser.error(str(error))
    card = {"device": options.device, "threads": torch.get_num_threads(), "torch": torch.__version__, "lengths": found}
    if options.out:
        write_json(Path(options.out), card)
    return 0


def _measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    subject = load_subject(options.model or str(organism.directory()), options.hook_point, device=options.device)
    sae = load_sae(options.sae).to(subject.device).eval() if options.sae else random_sae(subject)
    for kind in options.texts:
        for length in options.lengths:
            figures = measure(subject, sae, kind, options.samples, length, options.rounds)
            print(json.dumps(figures), flush=True)
            yield figures


if __name__ == "__main__":
    sys.exit(main())
