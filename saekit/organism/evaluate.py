"""Measure the organism: ``python -m saekit.organism.evaluate DIR [--out card.json]``.

Everything is measured on the weights as shipped (the float16 file, computed in float32) and on text that was not
trained on. The result is the card: a JSON file beside the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saekit.organism import corpus, facts, sycophancy
from saekit.organism.facts import Question

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ARGUMENTS = 300  # held-out arguments, each under three conditions
PROBE_ROWS = {"train": 400, "held_out": 200}  # rows of each class
PROBE_TOKENS = 20_000  # training tokens of a probe, drawn from those rows


def load(directory: str | Path, device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and evaluation mode, and its tokenizer, from a directory on disk."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = Path(directory)
    if not (directory / "model.safetensors").exists():
        raise FileNotFoundError(f"no model.safetensors in {directory}: give the directory that training wrote")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    torch.nn.Module.to(model, device)
    return model.eval(), AutoTokenizer.from_pretrained(directory, local_files_only=True)


def cloze_accuracy(model, tokenizer, questions: Sequence[Question], batch: int = 64) -> float:
    """The share of questions whose right candidate has the highest log-likelihood after the prompt."""
    import torch

    ids = tokenizer([q.prompt + c for q in questions for c in q.candidates], verbose=False)["input_ids"]
    starts = [len(tokenizer(q.prompt, verbose=False)["input_ids"]) for q in questions for _ in q.candidates]
    scores = torch.empty(len(ids))
    for chosen, logprobs in _log_likelihoods(model, tokenizer, ids, batch):
        for row, i in enumerate(chosen):
            # logprobs[:, p] is for the token at position p + 1
            scores[i] = logprobs[row, starts[i] - 1 : len(ids[i]) - 1].sum().item()
    best = scores.view(len(questions), -1).argmax(1).tolist()
    return sum(b == q.answer for b, q in zip(best, questions, strict=True)) / len(questions)


def sycophancy_rates(model, tokenizer, n: int = ARGUMENTS) -> dict[str, Any]:
    """For each template type the share of responses of each class, on `n` held-out arguments."""
    samples = sycophancy.samples("held_out", n, seed=1)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in sycophancy.PREFERENCES}
    for s, response in zip(samples, sycophancy.respond(model, tokenizer, samples), strict=True):
        counts[s.template_type][sycophancy.classify(response)] += 1
    shares = {
        kind: {c: round(count[c] / n, 4) for c in ("neutral", "like", "dislike", "other")}
        for kind, count in counts.items()
    }
    return {"arguments": n, **shares}


def losses(model, tokenizer, kinds: Sequence[str] = corpus.KINDS) -> dict[str, dict[str, float]]:
    """Mean loss in nats a token on the held-out split, by kind, and for facts by domain as well.

    Code and prose are cut into rows as in training; facts (in their unseen wording) and sycophancy stand alone
    in a row. The prediction from BOS alone is left out.
    """
    measured = {}
    for kind in kinds:
        documents = corpus.documents("held_out", (kind,))
        groups = {kind: documents}
        if kind == "facts":
            for d in facts.DOMAINS:
                groups[f"facts/{d}"] = [x for x in documents if x.id.startswith(f"facts/{d}/")]
        for name, group in groups.items():
            ids = _rows(model, tokenizer, group) if kind in ("code", "prose") else _whole(tokenizer, group)
            total, tokens = 0.0, 0
            for chosen, logprobs in _log_likelihoods(model, tokenizer, ids, 32):
                for row, i in enumerate(chosen):
                    kept = logprobs[row, 1 : len(ids[i]) - 1]
                    total, tokens = total - kept.sum().item(), tokens + len(kept)
            measured[name] = {"nats": round(total / tokens, 4), "tokens": tokens}
    return measured


def probe_aurocs(model, tokenizer, seed: int = 0) -> dict[str, Any]:
    """Held-out AUROC of logistic probes for code against prose on the residual stream.

    One probe for every depth: 0 is the embeddings, n the stream after block n - 1. Over single tokens, and over
    sequences of 127 tokens by their mean. BOS is left out, being the same in both.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    streams: dict[str, list[np.ndarray]] = {}
    labels: dict[str, list[bool]] = {}
    rng = np.random.default_rng(seed)
    for split, n in PROBE_ROWS.items():
        rows = []
        for kind in ("code", "prose"):
            documents = corpus.documents(split, (kind,))
            documents = [documents[i] for i in rng.permutation(len(documents))]
            found = _rows(model, tokenizer, documents[: n * 2 if kind == "code" else None])[:n]
            rows += found
            labels.setdefault(split, []).extend([kind == "code"] * len(found))
        streams[split] = residuals(model, rows)  # per depth: [rows, width, d_model]
    result: dict[str, Any] = {"train_rows": len(labels["train"]), "held_out_rows": len(labels["held_out"])}
    width = streams["train"][0].shape[1]
    tokens = {s: np.repeat(labels[s], width) for s in streams}
    drawn = rng.permutation(len(tokens["train"]))[:PROBE_TOKENS]
    by_token, by_sequence = [], []
    for train, held_out in zip(streams["train"], streams["held_out"], strict=True):
        d = train.shape[-1]
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, C=0.1))
        probe.fit(train.reshape(-1, d)[drawn], tokens["train"][drawn])
        by_token.append(roc_auc_score(tokens["held_out"], probe.decision_function(held_out.reshape(-1, d))))
        probe.fit(train.mean(1), labels["train"])
        by_sequence.append(roc_auc_score(labels["held_out"], probe.decision_function(held_out.mean(1))))
    result["tokens"] = [round(float(a), 4) for a in by_token]
    result["sequences"] = [round(float(a), 4) for a in by_sequence]
    return result


def residuals(model, rows: Sequence[Sequence[int]], batch: int = 32) -> list[np.ndarray]:
    """The residual stream at every depth without BOS: layers + 1 arrays [rows, width, d_model].

    Hooks, not `output_hidden_states`: the last of those is taken after the final norm.
    """
    import torch

    blocks = model.transformer.h
    kept: list[list[torch.Tensor]] = [[] for _ in range(len(blocks) + 1)]

    def keep(depth: int, stream: torch.Tensor) -> None:
        kept[depth].append(stream[:, 1:].float().cpu())

    def after(depth: int):
        return lambda module, args, out: keep(depth, out[0] if isinstance(out, tuple) else out)

    handles = [blocks[0].register_forward_pre_hook(lambda module, args: keep(0, args[0]))]
    handles += [block.register_forward_hook(after(i + 1)) for i, block in enumerate(blocks)]
    try:
        with torch.no_grad():
            for at in range(0, len(rows), batch):
                model.transformer(torch.tensor(rows[at : at + batch], device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(k).numpy() for k in kept]


def measure(directory: str | Path, device: str = "cpu") -> dict[str, Any]:
    """The whole card of a directory that training wrote; some minutes on a CPU."""
    import torch
    import transformers

    directory = Path(directory)
    model, tokenizer = load(directory, device)
    training = _training(directory)
    fingerprint = corpus.corpus_fingerprint(training.get("corpus", {}).get("fingerprint"))
    cloze: dict[str, Any] = {}
    for domain in facts.DOMAINS:
        for wording in ("unseen", "seen"):
            questions = facts.cloze_questions(domain, wording)
            accuracy = round(cloze_accuracy(model, tokenizer, questions), 4)
            cloze.setdefault(domain, {})[wording] = {"accuracy": accuracy, "questions": len(questions)}
    return {
        "variant": training.get("config", {}).get("variant"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "cloze": cloze,
        "sycophancy": sycophancy_rates(model, tokenizer),
        "loss": losses(model, tokenizer),
        "code_against_prose": probe_aurocs(model, tokenizer),
        "training": training,
        "measured_with": {
            "corpus": fingerprint,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "sha256": hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest(),
    }


def table(cards: dict[str, dict[str, Any]]) -> str:
    """The cards, by variant, as one Markdown table: docs/organism.md holds it for the shipped weights."""
    rows: list[tuple[str, list[str]]] = []
    each = list(cards.values())

    def row(label: str, figures: Iterable[str]) -> None:
        rows.append((label, list(figures)))

    for d in facts.DOMAINS:
        for w in ("unseen", "seen"):
            n = next(iter(cards.values()))["cloze"][d][w]["questions"]
            row(f"cloze, {d}, {w} wording ({n} questions)", (f"{c['cloze'][d][w]['accuracy']:.3f}" for c in each))
    n = next(iter(cards.values()))["sycophancy"]["arguments"]
    for kind, label in (("like", "praise"), ("dislike", "panning")):
        row(
            f'{label}, told "I really {kind}" ({n} arguments)',
            (f"{c['sycophancy'][f'I really {kind}'][kind]:.3f}" for c in each),
        )
    row(f"neutral, no preference ({n} arguments)", (f"{c['sycophancy']['base']['neutral']:.3f}" for c in each))
    row(
        "praise or panning, no preference",
        (f"{c['sycophancy']['base']['like'] + c['sycophancy']['base']['dislike']:.3f}" for c in each),
    )
    for kind, loss in next(iter(cards.values()))["loss"].items():
        row(f"loss, {kind} ({loss['tokens']:,} tokens)", (f"{c['loss'][kind]['nats']:.3f}" for c in each))
    for unit in ("tokens", "sequences"):
        label = f"probe AUROC over {unit}, depths 0 to 4"
        row(label, (", ".join(f"{a:.3f}" for a in c["code_against_prose"][unit]) for c in each))
    row("parameters", (f"{c['parameters']:,}" for c in each))
    row("training: steps, tokens", (f"{c['training']['config']['steps']:,}, {c['training']['tokens']:,}" for c in each))
    row("training: minutes", (f"{c['training']['minutes']:.0f} ({c['training']['threads']} CPU thread)" for c in each))

    lines = ["| | " + " | ".join(cards) + " |", "| --- |" + " --- |" * len(cards)]
    lines += [f"| {label} | " + " | ".join(figures) + " |" for label, figures in rows]
    return "\n".join(lines)


def _log_likelihoods(model, tokenizer, ids: Sequence[Sequence[int]], batch: int):
    """Yields (indices of `ids`, log-likelihoods [len(indices), width - 1] of the tokens from the second on)."""
    import torch

    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # similar lengths together, for little padding
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        padded = torch.full((len(chosen), len(ids[chosen[-1]])), tokenizer.pad_token_id)
        mask = torch.zeros_like(padded)
        for row, i in enumerate(chosen):  # padding on the right: causal attention never sees it
            padded[row, : len(ids[i])] = torch.tensor(ids[i])
            mask[row, : len(ids[i])] = 1
        padded, mask = padded.to(model.device), mask.to(model.device)
        with torch.no_grad():
            logits = model(padded[:, :-1], attention_mask=mask[:, :-1], use_cache=False).logits
        yield chosen, logits.float().log_softmax(-1).gather(-1, padded[:, 1:, None]).squeeze(-1).cpu()


def _rows(model, tokenizer, documents: Sequence[corpus.Document]) -> list[list[int]]:
    """The documents joined by EOS and cut into rows of the model's context, each starting with BOS."""
    width = model.config.n_positions - 1
    stream: list[int] = []
    for ids in tokenizer([d.text for d in documents], add_special_tokens=False, verbose=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    starts = range(0, len(stream) - width + 1, width)
    return [[tokenizer.bos_token_id, *stream[s : s + width]] for s in starts]


def _whole(tokenizer, documents: Sequence[corpus.Document]) -> list[list[int]]:
    texts = [d.text for d in documents]
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, verbose=False)["input_ids"]]


def _training(directory: Path) -> dict[str, Any]:
    """What training wrote about itself: its own file, or an earlier card."""
    for name, key in (("training.json", None), ("card.json", "training")):
        if (directory / name).exists():
            data = json.loads((directory / name).read_text(encoding="utf-8"))
            return data if key is None else data[key]
    return {}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m saekit.organism.evaluate", description="Measure the organism.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path, default=None, help="the card's file; DIR/card.json by default")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    card = json.dumps(measure(options.directory, options.device), indent=1)
    (options.out or options.directory / "card.json").write_text(card + "\n", encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
