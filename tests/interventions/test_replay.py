"""A replay from the site up gives what a rerun of the whole model gives, and leaves the model as it was."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from interventions.models import LANGUAGE_MODELS, Case, D, loaded
from torch import Tensor, nn

from saekit import UsageError
from saekit.activations.sites import resolve
from saekit.interventions.replay import Replay
from saekit.testing.tiny import in_float64

LENGTH = 24  # more than tiny Gemma-2's sliding window
TEXT = torch.randint(2, 300, (3, LENGTH), generator=torch.Generator().manual_seed(1))
PADDED = torch.arange(LENGTH) < torch.tensor([[LENGTH], [17], [9]])
SITES = [
    "blocks.0.hook_in",
    "blocks.0.hook_out",
    "blocks.1.hook_in",
    "blocks.1.hook_out",
    "blocks.2.hook_out",
    "{blocks}.1.mlp",
    "{blocks}.1.{attention}[0]",
    "{blocks}.2.mlp:input",
    "{norm}",
]
NAMES = {
    "tiny_gpt2": {"blocks": "transformer.h", "attention": "attn", "norm": "transformer.ln_f"},
    "tiny_llama": {"blocks": "model.layers", "attention": "self_attn", "norm": "model.norm"},
    "tiny_gemma2": {"blocks": "model.layers", "attention": "self_attn", "norm": "model.norm"},
}


@pytest.fixture(params=LANGUAGE_MODELS)
def named(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, str]]:
    return loaded(request.getfixturevalue(request.param)), NAMES[request.param]


def state(model: nn.Module) -> tuple[int, list[str]]:
    """What a replay may not leave behind: hooks, and forwards of a module's own."""
    modules = dict(model.named_modules())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules.values())
    return hooks, [name for name, module in modules.items() if "forward" in vars(module)]


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def disturbed(activation: Tensor, seed: int = 2) -> Tensor:
    noise = torch.randn(activation.shape, generator=torch.Generator().manual_seed(seed))
    return activation + noise * activation.std()


def rerun(model: nn.Module, name: str, tokens: Tensor, new: Tensor, mask: Tensor | None = None) -> Tensor:
    options = {} if mask is None else {"attention_mask": mask.long()}
    with resolve(model, name).replaced(lambda _: new):
        return logits_of(model(tokens, **options))


@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_a_replay_equals_a_full_rerun(named, site: str, mask: Tensor | None) -> None:
    model, names = named
    name = site.format(**names)
    replay = Replay(model, resolve(model, name))
    before = state(model)
    recording = replay.record(TEXT, mask)
    new = disturbed(recording.activation)
    expected = rerun(model, name, TEXT, new, mask)
    assert not torch.allclose(expected, logits_of(model(TEXT)), atol=1e-3), "the disturbance changes too little"
    torch.testing.assert_close(logits_of(replay.run(recording, new)), expected, rtol=0, atol=1e-5)
    assert state(model) == before


@pytest.mark.parametrize("length", [LENGTH, 2, 1])
@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_the_last_position_alone_equals_a_full_rerun(named, site: str, length: int) -> None:
    model, names = named
    name = site.format(**names)
    tokens = TEXT[:, :length]
    replay = Replay(model, resolve(model, name))
    before = state(model)
    recording = replay.record(tokens, past=True)
    assert recording.past is not None
    rows = torch.tensor([2, 0, 1, 1, 2])
    new = recording.activation[rows].clone()
    new[:, -1:] = disturbed(new[:, -1:])
    expected = rerun(model, name, tokens[rows], new)[:, -1:]
    for _ in range(2):  # a recording is not used up
        found = logits_of(replay.run_last(recording, new[:, -1:], rows))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    plain = logits_of(replay.run_last(recording, recording.activation[:, -1:]))
    torch.testing.assert_close(plain, logits_of(model(tokens))[:, -1:], rtol=0, atol=1e-5)
    assert state(model) == before


@pytest.mark.parametrize("length", [LENGTH, 12])
@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_what_all_rows_begin_with_is_run_once(named, site: str, length: int) -> None:
    model, names = named
    name = site.format(**names)
    text = torch.cat([TEXT[:1, : length - 5].expand(20, -1), torch.arange(2, 102).view(20, 5)], 1)
    widths: list[tuple[int, ...]] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda m, a, output: widths.append(tuple(output.shape[:2]))
    )
    replay = Replay(model, resolve(model, name))
    recording = replay.record(text, past=True, below=True)
    handle.remove()
    assert widths == [(1, length - 5), (20, 5)]
    with resolve(model, name).capture() as captured:
        expected = logits_of(model(text))
    torch.testing.assert_close(recording.activation, captured.value, rtol=0, atol=1e-5)
    torch.testing.assert_close(replay.record(text).activation, captured.value, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_of(replay.run(recording, recording.activation)), expected, rtol=0, atol=1e-5)
    last = logits_of(replay.run_last(recording, recording.activation[:, -1:]))
    torch.testing.assert_close(last, expected[:, -1:], rtol=0, atol=1e-5)
    tokens, rows = torch.cat([text[:3, :-2], TEXT[:, :4]], 1), torch.arange(3)
    found = replay.branch(recording, tokens, rows, length - 2)
    torch.testing.assert_close(found, replay.record(tokens).activation[:, -4:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shared", [LENGTH - 1, 18, 1])
@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_a_branch_equals_a_forward_of_the_whole_text(named, site: str, shared: int) -> None:
    model, names = named
    replay = Replay(model, resolve(model, site.format(**names)))
    before = state(model)
    recording = replay.record(TEXT, below=True)
    rows = torch.tensor([2, 0, 2, 1])
    new = torch.randint(2, 300, (4, 5), generator=torch.Generator().manual_seed(3))
    tokens = torch.cat([TEXT[rows, :shared], new], 1)
    expected = replay.record(tokens).activation
    assert not torch.allclose(expected[0, shared:], expected[2, shared:], atol=1e-4)
    found = replay.branch(recording, tokens, rows, shared)
    torch.testing.assert_close(found, expected[:, shared:], rtol=0, atol=1e-5)
    assert state(model) == before
    with pytest.raises(ValueError, match="no keys and values"):
        replay.branch(replay.record(TEXT, past=True), tokens, rows, shared)


def test_what_lies_below_does_not_run_again(named) -> None:
    model, names = named
    ran: Counter[int] = Counter()
    blocks = model.get_submodule(names["blocks"])
    for number, block in enumerate(blocks):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.update([number]))
    replay = Replay(model, resolve(model, "blocks.1.hook_out"))
    assert replay.skips == 2
    recording = replay.record(TEXT)
    assert ran == {0: 1, 1: 1}, "recording ends at the site"
    replay.run(recording, recording.activation)
    assert ran == {0: 1, 1: 1, 2: 1}
    ran.clear()
    recording = replay.record(TEXT, past=True)
    assert ran == {0: 1, 1: 1}, "of the last block only keys and values are needed"
    replay.run_last(recording, recording.activation[:, -1:])
    assert ran == {0: 1, 1: 1, 2: 1}


def test_the_gradient_is_that_of_a_full_rerun_and_begins_at_the_site(named) -> None:
    model, _ = named
    in_float64(model)
    replay = Replay(model, resolve(model, "blocks.1.hook_out"))
    recording = replay.record(TEXT, past=True)
    assert not recording.activation.requires_grad
    leaf = recording.activation.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(rerun(model, "blocks.1.hook_out", TEXT, leaf)[:, -1].square().sum(), leaf)
    again = recording.activation.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(logits_of(replay.run(recording, again))[:, -1].square().sum(), again)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    last = recording.activation[:, -1:].clone().requires_grad_(True)
    (found,) = torch.autograd.grad(logits_of(replay.run_last(recording, last)).square().sum(), last)
    torch.testing.assert_close(found, expected[:, -1:], rtol=0, atol=1e-9)


class TupleBlock(nn.Module):
    """A block of the older kind: it gives a tuple, and asks for its hidden state by name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.runs = 0

    def forward(self, *, hidden_states: Tensor) -> tuple[Tensor, None, None]:
        self.runs += 1
        mean = hidden_states.cumsum(1) / torch.arange(1, hidden_states.shape[1] + 1)[:, None]
        return hidden_states + torch.tanh(self.linear(mean)), None, None


class OlderModel(nn.Module):
    """tokens [n, T] -> [n, T, 320], by blocks in a list that give tuples; no cache, no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(320, D)
        self.blocks = nn.ModuleList(TupleBlock() for _ in range(3))
        self.head = nn.Linear(D, 320)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden, _, _ = block(hidden_states=hidden)
        return self.head(hidden)


@pytest.mark.parametrize("name", ["blocks.1", "blocks.1[0]", "blocks.2.hook_in", "blocks.1.linear"])
@torch.no_grad()
def test_blocks_that_give_tuples_are_skipped_too(name: str) -> None:
    model = OlderModel().eval()
    replay = Replay(model, resolve(model, name))
    recording = replay.record(TEXT, past=True)
    assert recording.past is None, "this model keeps no keys and values"
    new = disturbed(recording.activation)
    expected = rerun(model, name, TEXT, new)
    below = model.blocks[0].runs
    torch.testing.assert_close(replay.run(recording, new), expected, rtol=0, atol=1e-5)
    assert model.blocks[0].runs == below
    with pytest.raises(ValueError, match="no keys and values"):
        replay.run_last(recording, new[:, -1:])


@torch.no_grad()
def test_a_model_without_recognisable_blocks_runs_whole(case: Case) -> None:
    replay = Replay(case.model, resolve(case.model, case.middle))
    recording = replay.record(TEXT)
    new = disturbed(recording.activation)
    expected = rerun(case.model, case.middle, TEXT, new)
    torch.testing.assert_close(logits_of(replay.run(recording, new)), expected, rtol=0, atol=1e-5)


def test_nothing_is_left_behind_by_a_failure(named) -> None:
    model, names = named
    replay = Replay(model, resolve(model, f"{names['blocks']}.1.mlp"))
    before = state(model)
    recording = replay.record(TEXT, past=True)
    for run, activation in ((replay.run, recording.activation), (replay.run_last, recording.activation[:, -1:])):
        with pytest.raises(UsageError, match="the replacement has shape"):
            run(recording, activation[..., :-1])
    with pytest.raises(IndexError):
        replay.record(TEXT + 10_000, past=True)
    assert state(model) == before
    with pytest.raises(ValueError, match="leave the mask out"):
        replay.record(TEXT, PADDED, past=True)


def test_a_site_that_is_never_reached_is_an_error() -> None:
    model = OlderModel().eval()
    model.spare = nn.Linear(D, D)
    with pytest.raises(UsageError, match="never calls this module"):
        Replay(model, resolve(model, "spare")).record(TEXT)
