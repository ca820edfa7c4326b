"""The run file for gemma-2-9b-it fits the card that it names: computed from its numbers and the model's, not measured."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import torch

RUN_FILE = Path(__file__).parents[3] / "docs" / "examples" / "attribution" / "gemma-2-9b-it.toml"
GB = 1e9
FREE = 0.9  # of the card: the rest is CUDA's own and lost between blocks
# What google/gemma-2-9b-it says in its config.json, and Gemma Scope of the SAE.
VOCABULARY, WIDTH, BLOCKS, MIDDLE, D_SAE = 256_000, 3584, 42, 14_336, 16_384
KEPT = 0.4e6  # bytes of a token in a block that the way back needs: residual, norms in float32, heads, and the MLP's tables


def weights() -> float:
    """Bytes of the model in bfloat16; it is made without memory."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=BLOCKS, intermediate_size=MIDDLE, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256,
    )  # fmt: skip
    with torch.device("meta"):
        model = Gemma2ForCausalLM(config)
    return 2.0 * sum(parameter.numel() for parameter in model.parameters())


def test_the_run_file_of_gemma_fits_its_card() -> None:
    text = RUN_FILE.read_text(encoding="utf-8")
    run = tomllib.loads(text)
    card = float(re.search(r"a GPU of (\d+) GB", text)[1]) * GB  # type: ignore[index]
    assert run["training"]["tokens"] == 0  # no gradients, no moments of Adam
    assert run["source"]["model_dtype"] == "bfloat16"
    sae = 4.0 * 2 * WIDTH * D_SAE
    evaluation = 4.0 * (run["evaluation"]["tokens"] * WIDTH + 6 * 4096 * D_SAE)
    sizes = {analyzer["use"]: analyzer["batch_tokens"] for analyzer in run["analyzer"]}
    rows = 8  # of the source's held-out text at a time
    damage = max(rows * run["source"]["context"], sizes["ablate"]) * VOCABULARY * (5 * 4.0 + 2 * 2.0)
    block = int(re.fullmatch(r"blocks\.(\d+)\.hook_out", run["source"]["hook_point"])[1])  # type: ignore[index]
    attribution = sizes["atp"] * (BLOCKS - 1 - block) * KEPT
    peak = weights() + sae + evaluation + max(damage, attribution)
    assert peak < FREE * card, f"{peak / GB:.1f} GB"
    said = float(re.search(r"the peak is about (\d+) GB", " ".join(text.replace("#", "").split()))[1]) * GB  # type: ignore[index]
    assert abs(peak - said) < 0.6 * GB, f"{peak / GB:.1f} GB"
