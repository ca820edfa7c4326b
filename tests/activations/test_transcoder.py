"""Transcoders: two sites of one forward, read together, in whichever order, and spliced where the target is."""

import pytest
import tomli_w
import torch
from torch import nn

import saekit
from saekit.activations.sites import resolve, run_to_sites
from saekit.builtin.sources import TextSource
from saekit.errors import UsageError

CPU = torch.device("cpu")


def opened(model, data, hook_point="blocks.1.hook_in", target="blocks.1.hook_out", **options):
    source = TextSource(
        model=str(model),
        data=str(data),
        hook_point=hook_point,
        target_hook_point=target,
        context=16,
        rows=4,
        held_out=0.2,
        **options,
    )
    source.open(device=CPU, dtype=torch.float32)
    return source


@pytest.mark.parametrize(
    ("hook_point", "target"),
    [
        ("blocks.0.hook_out", "blocks.2.hook_out"),
        ("blocks.2.hook_out", "blocks.0.hook_out"),
        ("blocks.1.hook_in", "transformer.h.1.mlp"),
        ("transformer.h.1.mlp.c_fc", "transformer.h.1.mlp"),
        ("blocks.1.hook_out", "blocks.1.hook_out"),
    ],
)
def test_the_pair_is_what_two_sources_would_read(tiny_gpt2, jsonl_file, hook_point, target):
    both = opened(tiny_gpt2, jsonl_file, hook_point, target)
    block = next(both.blocks("train", size=100, seed=0))
    for name, at in (("x", hook_point), ("target", target)):
        alone = next(opened(tiny_gpt2, jsonl_file, at, None).blocks("train", size=100, seed=0))
        assert alone.target is None and torch.equal(getattr(block, name), alone.x)
    assert (both.d_in, both.d_out) == (block.x.shape[1], block.target.shape[1])
    assert both.identity()["target_hook_point"] == target
    assert both.peek()["hook_point"] == hook_point


class Steps(nn.Module):
    """Three layers; the second changes its input in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Identity(), nn.Identity(), nn.Identity()
        self.calls = []

    def forward(self, x):
        for name in ("first", "second", "third"):
            self.calls.append(name)
            x = getattr(self, name)(x + 1 if name == "first" else x.add_(1))
        return x


@pytest.mark.parametrize("names", [("first", "second"), ("second", "first")])
def test_the_forward_stops_at_the_later_site_and_keeps_what_the_earlier_one_was(names):
    model = Steps()
    found = run_to_sites([resolve(model, name) for name in names], lambda: model(torch.zeros(1)))
    assert dict(zip(names, map(float, found), strict=True)) == {"first": 1.0, "second": 2.0}
    assert model.calls == ["first", "second"]
    assert not any(module._forward_hooks for module in model.modules())


def test_a_site_that_is_not_reached_is_named():
    model = Steps()
    model.fourth = nn.Identity()
    with pytest.raises(UsageError, match="hook point 'fourth': .*never calls"):
        run_to_sites([resolve(model, "first"), resolve(model, "fourth")], lambda: model(torch.zeros(1)))


def test_splicing_replaces_the_target_by_a_function_of_the_other_site(tiny_gpt2, jsonl_file):
    source = opened(tiny_gpt2, jsonl_file)
    subject = source.subject
    batch = next(source.token_batches("held_out", rows=2))
    clean = subject.logits(batch)
    x, target = subject.pair(batch)
    seen = []

    def function(a, b):
        seen.append((a, b))
        return b

    with subject.spliced(function):
        assert torch.equal(subject.logits(batch), clean)
    assert torch.equal(seen[0][0], x) and torch.equal(seen[0][1], target)
    with subject.spliced(lambda a, b: a):  # the block is passed over
        skipped = subject.logits(batch)
    assert not torch.allclose(skipped, clean)
    subject.model.transformer.h[1].forward = lambda hidden, *args, **kwargs: hidden
    assert torch.allclose(subject.logits(batch), skipped, atol=1e-6)


def test_splicing_into_the_past_is_refused(tiny_gpt2, jsonl_file):
    source = opened(tiny_gpt2, jsonl_file, "blocks.2.hook_out", "blocks.0.hook_out")
    batch = next(source.token_batches("held_out", rows=2))
    with source.subject.spliced(lambda a, b: b):
        for _ in range(2):  # what the first forward read later is not the second one's
            with pytest.raises(
                UsageError, match=r"target_hook_point = 'blocks.0.hook_out': comes before the hook point"
            ):
                source.subject.logits(batch)


def test_a_target_that_does_not_exist_is_seen_early(tiny_gpt2, jsonl_file):
    source = TextSource(
        model=str(tiny_gpt2),
        data=str(jsonl_file),
        hook_point="blocks.1.hook_in",
        target_hook_point="blocks.7.hook_out",
        context=16,
    )
    with pytest.raises(UsageError, match="^target_hook_point: 'blocks.7.hook_out', but .* has 3 blocks"):
        source.peek()


def test_a_transcoder_run_from_a_file(tiny_gpt2, jsonl_file, tmp_path):
    """From the MLP's hidden units (128) to its output (32), with a metric that splices."""
    table = {
        "source": {
            "use": "text",
            "model": str(tiny_gpt2),
            "data": str(jsonl_file),
            "hook_point": "transformer.h.1.mlp.c_fc",
            "target_hook_point": "transformer.h.1.mlp",
            "context": 32,
            "held_out": 0.2,
        },
        "architecture": {"use": "topk", "d_sae": 64, "k": 4},
        "loss": [{"use": "mse"}],
        "metric": [{"use": "ce_recovered", "tokens": 200}],
        "training": {"tokens": 640, "batch_size": 64, "buffer": 512, "device": "cpu"},
        "evaluation": {"tokens": 300},
    }
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    finished = saekit.run(path, directory=tmp_path / "run")
    sae = saekit.load_sae(finished.directory / "sae")
    assert (sae.d_in, sae.d_out) == (128, 32)
    assert finished.summary["metrics"]["kl"] > 0
