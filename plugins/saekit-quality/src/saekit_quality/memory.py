"""What a contrastive batch costs in memory: `python -m saekit_quality.memory`."""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import RobertaConfig, RobertaModel
from transformers.utils.logging import disable_progress_bar

from saekit_quality.losses import quality_loss
from saekit_quality.model import ContrastiveQualityModel
from saekit_quality.pairs import VotePairs

CRITERIA = 9


def random_model(hidden: int, layers: int, tokens: int) -> ContrastiveQualityModel:
    """A random RoBERTa of this size, with heads for nine criteria."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=1000, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=4 * hidden, max_position_embeddings=tokens + 2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        RobertaModel(config).save_pretrained(place)
        return ContrastiveQualityModel(model_name=place, num_labels=CRITERIA).train()


def peak(model: ContrastiveQualityModel, rows: int, chunk: int, tokens: int) -> float:
    """How much more memory torch has allocated at the peak of one step on random responses than before it, in MB."""
    device = model.device
    ids = torch.randint(5, 1000, (rows, tokens), device=device)
    share = torch.randint(0, 4, (rows, CRITERIA), device=device) / 3

    def step(n: int) -> None:
        output = model(ids[:n], chunk_size=chunk)
        pairs = VotePairs(share[:n], "agreement")
        loss = quality_loss(output.logits, output.embedding, share[:n], pairs, lambda_contrastive=0.1, temperature=0.07).loss
        loss.backward()

    step(2)  # the gradients are there from now on
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(rows)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step(rows)
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 1e6


def outputs(model: ContrastiveQualityModel, rows: int) -> float:
    """What the model says of so many responses, in MB."""
    config = model.config
    return rows * (config.num_labels + config.projection_dim + model.classifier.in_features) * 4 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m saekit_quality.memory", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128, 512, 2048], help="responses in the batch")
    parser.add_argument("--chunk", type=int, default=32, help="responses encoded at a time")
    parser.add_argument("--whole", type=int, nargs="*", default=[128], help="batches that are also encoded at once")
    parser.add_argument("--tokens", type=int, default=32, help="of a response")
    parser.add_argument("--hidden", type=int, default=64, help="dimensions of the encoder")
    parser.add_argument("--layers", type=int, default=2, help="of the encoder")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    disable_progress_bar()
    model = random_model(args.hidden, args.layers, args.tokens).to(args.device)
    for rows, chunk in [*((n, args.chunk) for n in args.rows), *((n, n) for n in args.whole)]:
        found = peak(model, rows, chunk, args.tokens)
        print(f"{rows:6,} responses, {chunk:6,} at a time: {found:8.1f} MB; outputs: {outputs(model, rows):6.2f} MB", flush=True)


if __name__ == "__main__":
    main()
