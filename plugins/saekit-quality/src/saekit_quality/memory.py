"""What a contrastive batch costs in memory: `python -m saekit_quality.memory`. Each row is measured in a process of its own."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile

import torch
from transformers import RobertaConfig, RobertaModel

from saekit_quality.losses import quality_loss
from saekit_quality.model import ContrastiveQualityModel
from saekit_quality.pairs import VotePairs

CRITERIA = 9


def peak(rows: int, chunk: int, args: argparse.Namespace) -> float:
    """What one step on a batch of random responses adds to the process's memory at its peak, in MB."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=1000, hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=4,
        intermediate_size=4 * args.hidden, max_position_embeddings=args.tokens + 2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        RobertaModel(config).save_pretrained(place)
        model = ContrastiveQualityModel(model_name=place, num_labels=CRITERIA).to(args.device).train()

    def step(n: int) -> None:
        ids = torch.randint(5, 1000, (n, args.tokens), device=args.device)
        share = torch.randint(0, 4, (n, CRITERIA), device=args.device) / 3
        output = model(ids, chunk_size=chunk)
        pairs = VotePairs(share, "agreement")
        loss = quality_loss(output.logits, output.embedding, share, pairs, lambda_contrastive=0.1, temperature=0.07).loss
        loss.backward()

    step(2)  # makes the gradients, and loads what is loaded once
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(rows)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(rows)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m saekit_quality.memory", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128, 512, 2048], help="responses in the batch")
    parser.add_argument("--chunk", type=int, default=32, help="responses encoded at a time")
    parser.add_argument("--whole", type=int, nargs="*", default=[128], help="batches that are also encoded at once")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)  # what a child measures: rows and chunk
    args = parser.parse_args()
    if args.one:
        print(json.dumps(peak(*args.one, args)))
        return
    for rows, chunk in [*((n, args.chunk) for n in args.rows), *((n, n) for n in args.whole)]:
        command = [sys.executable, "-m", "saekit_quality.memory", *sys.argv[1:], "--one", str(rows), str(chunk)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        kept = rows * (256 + CRITERIA + args.hidden) * 4 / 1e6
        print(f"{rows:6,} responses, {chunk:6,} at a time: {float(done.stdout):8.1f} MB; outputs: {kept:6.1f} MB", flush=True)


if __name__ == "__main__":
    main()
