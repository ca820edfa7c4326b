"""Train the organism: ``python -m saekit.organism.train --variant base|oracle --out DIR``.

A GPT-2 of 3.7 million parameters on four kinds of text at once. A batch has 32 rows of 128 positions, always
in the same mix: 12 of code, 10 of prose, 6 of facts, 4 of sycophancy. Every row starts with BOS.

The *oracle* is the same run with one difference: its facts rows hold no fact of the domain ``forget``. It is
what a perfect unlearning of that domain would give, and so the reference for methods that attempt it.

Batches are a pure function of the seed and the step, so an interrupted run resumes bit for bit (on one
machine, with the same number of threads). A checkpoint is one safetensors file, replaced atomically.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saekit.organism import corpus, facts
from saekit.organism import tokenizer as organism_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

VARIANTS = ("base", "oracle")


@dataclass(frozen=True)
class Config:
    """Everything the weights depend on. The defaults are those of the shipped weights."""

    variant: str = "base"
    steps: int = 1600
    seed: int = 0
    # Model. 2,048 tokens and 256 dimensions keep both variants under 16 MB in half precision.
    vocabulary: int = 2048
    d_model: int = 256
    layers: int = 4
    heads: int = 4
    context: int = 128
    # Rows of a batch, by kind; their order is the order of the rows.
    rows: tuple[tuple[str, int], ...] = (("code", 12), ("prose", 10), ("facts", 6), ("sycophancy", 4))
    # Optimiser: AdamW with a short warm-up, then a straight line down to zero.
    rate: float = 2e-3
    warm_up: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1  # on matrices; none on biases and norms
    clip: float = 1.0
    # Bookkeeping; no weight depends on it.
    save_every: int = 200
    print_every: int = 20


class Batches:
    """Rows of tokens as a function of the step.

    Code and prose are streams of documents in random order, separated by EOS, cut into rows; after each epoch
    the cuts move and the order of the rows changes. Rows of facts and of sycophancy begin with a whole document
    and are filled with further ones, so that prompts are learned where questions have them: right after BOS.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerFast):
        self.config = config
        self.width = config.context - 1  # tokens of a row after BOS
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._streams: dict[str, np.ndarray] = {}  # code, prose: [tokens]
        self._packed: dict[str, np.ndarray] = {}  # facts, sycophancy: [rows of the whole run, width]
        for i, (kind, rows) in enumerate(config.rows):
            texts = [d.text for d in training_documents(config.variant, kind)]
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            ids = [np.array([*t, self.eos], dtype=np.int64) for t in encoded]
            rng = np.random.default_rng([config.seed, i])
            if kind in ("code", "prose"):
                self._streams[kind] = np.concatenate([ids[j] for j in rng.permutation(len(ids))])
            else:
                self._packed[kind] = self._pack(ids, rows * config.steps, rng)

    def __call__(self, step: int) -> np.ndarray:
        """The batch of a step, [rows, context], in the order of `config.rows`."""
        rows = []
        for kind, n in self.config.rows:
            for r in range(step * n, (step + 1) * n):
                rows.append(self._packed[kind][r] if kind in self._packed else self._cut(kind, r))
        bos = np.full((len(rows), 1), self.bos, dtype=np.int64)
        return np.concatenate([bos, np.stack(rows)], axis=1)

    def _cut(self, kind: str, row: int) -> np.ndarray:
        """Row number `row` of a kind's stream, counted over the whole run: [width]."""
        stream = self._streams[kind]
        per_epoch = len(stream) // self.width - 1  # one less than fit: room for the epoch's shift
        epoch, i = divmod(row, per_epoch)
        shift, order = _epoch(self.config.seed, kind, epoch, per_epoch, self.width)
        start = shift + int(order[i]) * self.width
        return stream[start : start + self.width]

    def _pack(self, ids: list[np.ndarray], rows: int, rng: np.random.Generator) -> np.ndarray:
        """Whole documents, the last of a row cut, every document once before any again: [rows, width]."""
        source = _forever(ids, rng)
        packed = np.empty((rows, self.width), dtype=np.int64)
        for row in packed:
            filled = 0
            while filled < self.width:
                piece = next(source)[: self.width - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
        return packed


def training_documents(variant: str, kind: str) -> list[corpus.Document]:
    """The documents that a variant is trained on: for the oracle, no fact of the domain "forget"."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; the variants are {', '.join(VARIANTS)}")
    documents = corpus.documents("train", (kind,))
    if variant == "oracle":
        documents = [d for d in documents if not d.id.startswith("facts/forget/")]
    return documents


def build_model(config: Config, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """A fresh GPT-2 with tied embeddings and no dropout; its weights depend on the seed alone."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(config.seed)
    model_config = GPT2Config(
        vocab_size=config.vocabulary,
        n_positions=config.context,
        n_embd=config.d_model,
        n_layer=config.layers,
        n_head=config.heads,
        # The same function as GPT-2's "gelu_new", fused: training gains some per cent on a CPU.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(model_config)


def train(config: Config, out: str | Path, device: str = "auto", resume: bool = False) -> Path:
    """Train to the end and write the finished directory `out`; returns it.

    While it runs, `out/snapshot` is a loadable Hugging Face directory (of the last checkpoint) and
    `out/checkpoint.safetensors` what `resume` continues from. ValueError if the checkpoint has another
    configuration.
    """
    import torch

    from saekit.organism import evaluate

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    device = _device(device)
    tokenizer = organism_tokenizer.train(config.vocabulary, config.context)
    batches = Batches(config, tokenizer)
    model = build_model(config, tokenizer)
    torch.nn.Module.to(model, device)
    model.train()
    optimizer = _optimizer(model, config)
    checkpoint = out / "checkpoint.safetensors"
    first, spent = 0, 0.0
    if resume and checkpoint.exists():
        first, spent = _load(checkpoint, config, model, optimizer)
        _say(f"resumed at step {first}")

    questions = {d: facts.cloze_questions(d) for d in facts.DOMAINS}
    started = time.perf_counter()
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(config, step)
        tokens = torch.from_numpy(batches(step)).to(device)  # [rows, context]
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            logits = model(tokens[:, :-1], use_cache=False).logits  # [rows, context - 1, vocabulary]
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        ).view(len(tokens), -1)  # [rows, context - 1]
        optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()

        done = step + 1
        seconds = time.perf_counter() - started
        if done % config.print_every == 0 or done == config.steps:
            speed = (done - first) * tokens.numel() / seconds
            left = (config.steps - done) * tokens.numel() / speed / 60
            _say(f"step {done}/{config.steps}  {_by_kind(losses, config)}  {speed:.0f} tokens/s  {left:.1f} min left")
        if done % config.save_every == 0 or done == config.steps:
            _save(checkpoint, config, done, spent + seconds, model, optimizer)
            export(model, tokenizer, out / "snapshot")
            model.eval()
            scores = {d: evaluate.cloze_accuracy(model, tokenizer, q) for d, q in questions.items()}
            model.train()
            _say("cloze, unseen wording: " + "  ".join(f"{d} {s:.3f}" for d, s in scores.items()))

    import transformers

    provenance = {
        "config": asdict(config),
        "corpus": {"fingerprint": corpus.corpus_fingerprint(), "python": platform.python_version()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tokens": config.steps * sum(n for _, n in config.rows) * config.context,
        "minutes": round((spent + time.perf_counter() - started) / 60, 1),
        "device": device,
        "threads": torch.get_num_threads(),
    }
    _write(out / "training.json", json.dumps(provenance, indent=1).encode())
    export(model, tokenizer, out)
    return out


def rate(config: Config, step: int) -> float:
    """The learning rate of a step: up over `warm_up` steps, then a straight line to zero after the last."""
    falling = (config.steps - step) / max(1, config.steps - config.warm_up)
    return config.rate * min((step + 1) / config.warm_up, falling)


def export(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> None:
    """Write a plain Hugging Face directory; each file is replaced atomically, the weights last.

    The weights are stored in float16, half the size; the configuration says float32, so that
    `from_pretrained` computes in float32 by default: half precision is slow and rough on a CPU.
    """
    import torch
    from safetensors.torch import save

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict()
    config.update(architectures=["GPT2LMHeadModel"], dtype="float32", torch_dtype="float32")
    config.pop("_name_or_path", None)
    generation = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation.update(do_sample=False, max_new_tokens=48)
    temporary = directory / "tokenizer.tmp"
    organism_tokenizer.save(tokenizer, temporary)
    for file in temporary.iterdir():
        os.replace(file, directory / file.name)
    temporary.rmdir()
    _write(directory / "config.json", json.dumps(config, indent=1, sort_keys=True).encode())
    _write(directory / "generation_config.json", json.dumps(generation, indent=1).encode())
    weights = {  # the output matrix is the embedding: stored once
        name: tensor.detach().to("cpu", torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    _write(directory / "model.safetensors", save(weights, metadata={"format": "pt"}))


@functools.lru_cache(maxsize=8)
def _epoch(seed: int, kind: str, epoch: int, rows: int, width: int) -> tuple[int, np.ndarray]:
    """An epoch's shift of the cuts and its order of the rows."""
    rng = np.random.default_rng([seed, corpus.KINDS.index(kind), 1 + epoch])
    return int(rng.integers(width)), rng.permutation(rows)


def _forever(ids: list[np.ndarray], rng: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        for j in rng.permutation(len(ids)):
            yield ids[j]


def _optimizer(model: GPT2LMHeadModel, config: Config) -> torch.optim.AdamW:
    import torch

    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.rate, betas=config.betas, fused=True)


def _by_kind(losses: torch.Tensor, config: Config) -> str:
    means, start = [], 0
    for kind, n in config.rows:
        means.append(f"{kind} {losses[start : start + n].mean().item():.3f}")
        start += n
    return "  ".join(means)


def _identity(config: Config) -> str:
    """The configuration without keys that do not affect the weights, as a string to compare."""
    return json.dumps(asdict(replace(config, save_every=0, print_every=0)), sort_keys=True)


def _save(path: Path, config: Config, step: int, seconds: float, model, optimizer) -> None:
    from safetensors.torch import save

    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for i, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{i}.{k}": v.contiguous() for k, v in state.items()})
    metadata = {"config": _identity(config), "step": str(step), "seconds": str(seconds)}
    _write(path, save({k: v.cpu() for k, v in tensors.items()}, metadata=metadata))


def _load(path: Path, config: Config, model, optimizer) -> tuple[int, float]:
    """Restore model and optimiser; returns the step to continue from and the seconds already spent."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
        if metadata["config"] != _identity(config):
            raise ValueError(
                f"{path} was made with another configuration:\n  there: {metadata['config']}\n  here:  {_identity(config)}\n"
                "Use the same options, or another --out."
            )
        names = file.keys()  # the file itself is not iterable
        tensors = {name: file.get_tensor(name) for name in names}
    weights = {k[len("model.") :]: v for k, v in tensors.items() if k.startswith("model.")}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    model.load_state_dict(weights)
    state = optimizer.state_dict()
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            state["state"].setdefault(int(i), {})[name] = value
    optimizer.load_state_dict(state)
    return int(metadata["step"]), float(metadata["seconds"])


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    default = Config()
    parser = argparse.ArgumentParser(prog="python -m saekit.organism.train", description="Train the organism.")
    parser.add_argument("--variant", choices=VARIANTS, default=default.variant)
    parser.add_argument("--out", type=Path, required=True, help="directory for the finished model")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; what torch chooses by default")
    parser.add_argument("--save-every", type=int, default=default.save_every)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out, if there is one")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    config = Config(options.variant, options.steps, options.seed, save_every=options.save_every)
    train(config, options.out, options.device, options.resume)


if __name__ == "__main__":
    main()
