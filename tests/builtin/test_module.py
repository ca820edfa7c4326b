"""The source `module`: any module on any batches, in blocks that come again, with the page's example as it stands."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import saekit
from saekit.activations.cache import CachedSource
from saekit.activations.shuffle import ShuffledBatches
from saekit.builtin.sources import ModuleSource
from saekit.errors import RunError, UsageError

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[2] / "docs" / "module.md"


class Net(nn.Module):
    """Gives a tuple, a dictionary and sequences on the way to its output."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body, self.pair, self.table, self.head = nn.Linear(3, 4), Pair(), Table(), nn.Linear(4, 2)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.dropout = nn.Dropout(0.5)
        self.forwards = 0

    def forward(self, x, scale=1.0):
        self.forwards += 1
        hidden = self.dropout(self.body(x)) * scale
        return self.head(self.table(self.pair(hidden)[0])["kept"])


class Pair(nn.Module):
    def forward(self, x):
        return x, x * 2


class Table(nn.Module):
    def forward(self, x):
        return {"kept": x, "three": torch.stack([x, x + 1], 1)}


ROWS = torch.arange(30.0).repeat_interleave(4)[:, None] * torch.tensor([1.0, 0.5, 0.1])  # [120, 3], four of each


def loader():
    """Thirty batches of four equal rows: batch b is b, b / 2, b / 10."""
    return DataLoader(TensorDataset(ROWS), batch_size=4)


def by_split(split, seed):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(20, generator=generator) if split == "train" else torch.arange(20, 30)
    for number in numbers.tolist():
        yield ROWS[4 * number : 4 * number + 4]


def opened(module=Net, data=by_split, hook_point="body", **options):
    source = ModuleSource(module=module, data=data, hook_point=hook_point, **options)
    source.open(device=CPU, dtype=torch.float32)
    return source


def blocks(source, split="train", n=None, size=12, seed=0, start=0):
    return list(itertools.islice(source.blocks(split, size=size, seed=seed, start=start), n))


def joined(found):
    return torch.cat([block.x for block in found])


def number_of(x):
    """Which batch rows come from, by undoing the first layer."""
    body = Net().body
    return torch.linalg.lstsq(body.weight, (x - body.bias).T).solution[0].round().long()


def test_a_pass_has_every_batch_once_and_the_next_another_order():
    source = opened()
    passes = joined(blocks(source, n=14, size=12))[:160].view(2, 80, 4)
    for one in passes:
        assert sorted(number_of(one).tolist()) == sorted(list(range(20)) * 4)
    assert not torch.equal(*passes)
    held_out = blocks(source, "held_out", size=12)
    assert number_of(joined(held_out)).tolist() == torch.arange(20, 30).repeat_interleave(4).tolist()
    assert [len(block) for block in held_out] == [12, 12, 12, 4]
    assert torch.equal(joined(blocks(source, "held_out", seed=3)), joined(held_out))


def test_block_b_of_a_fresh_source_is_block_b_of_a_running_one():
    running = blocks(opened(), n=20)
    for start in (0, 1, 6, 7, 19):  # within passes, across them, in the third
        source = opened()
        before = source.network.forwards
        (block,) = blocks(source, n=1, start=start)
        assert torch.equal(block.x, running[start].x) and torch.equal(block.sequence, running[start].sequence)
        assert source.network.forwards - before == 3, "batches that are passed over do not go through the module"
    assert not torch.equal(blocks(opened(), n=1, seed=1)[0].x, running[0].x)


def test_the_module_is_frozen_in_evaluation_mode_and_stops_at_the_site():
    source = opened(hook_point="body", data=by_split)
    calls = []
    source.network.head.register_forward_hook(lambda *_: calls.append(1))
    block = blocks(source, n=1)[0]
    assert not calls and not block.x.requires_grad and not source.network.training
    assert not any(p.requires_grad for p in source.network.parameters())
    body = Net().body
    rows = number_of(block.x)
    torch.testing.assert_close(block.x, body(ROWS[rows * 4]).detach(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("hook_point", "width", "positions"),
    [
        ("body", 4, 1),
        ("body:input", 3, 1),
        ("pair[1]", 4, 1),
        ("table[kept]", 4, 1),
        ("table[three]", 4, 2),
        (".", 2, 1),
    ],
)
def test_items_inputs_sequences_and_the_whole(hook_point, width, positions):
    source = opened(hook_point=hook_point)
    (block,) = blocks(source, n=1, size=4 * positions)
    assert block.x.shape == (4 * positions, width) == (len(block.sequence), source.d_in)
    assert block.position.tolist() == list(range(positions)) * 4
    assert block.sequence.unique().numel() == 4
    if hook_point == "table[three]":
        assert torch.equal(block.x[1::2], block.x[::2] + 1)


def test_a_target_at_another_site():
    source = opened(hook_point="body:input", target_hook_point="pair[1]")
    (block,) = blocks(source, n=1)
    assert (source.d_in, source.d_out) == (3, 4)
    torch.testing.assert_close(block.target, 2 * Net().body(block.x).detach())


@pytest.mark.parametrize(
    ("batch", "args", "scale"),
    [
        (ROWS[:4], None, 1),
        ((ROWS[:4], 3.0), None, 3),
        ([ROWS[:4], 3.0], [0], 1),
        ({"x": ROWS[:4], "scale": 2.0}, None, 2),
        ({"x": ROWS[:4], "label": 7}, ["x"], 1),
    ],
)
def test_how_a_batch_is_passed_on(batch, args, scale):
    source = opened(data=lambda: [batch] * 3, hook_point="pair[0]", args=args)
    (block,) = blocks(source, n=1, size=4)
    torch.testing.assert_close(block.x, Net().body(ROWS[:4]).detach() * scale)


def test_without_a_split_some_batches_are_held_out_by_their_number():
    source = opened(data=loader, held_out=0.1)
    held_out = number_of(joined(blocks(source, "held_out", size=4)))
    assert held_out.unique().tolist() == [1, 11, 21]
    trained = number_of(joined(blocks(source, n=27, size=4)))
    assert sorted(trained.unique().tolist()) == sorted(set(range(30)) - {1, 11, 21})
    assert source.warnings == []
    assert source.pass_size == 108
    assert len(joined(list(source.first_pass(size=16, seed=0)))) == 108
    tail = list(source.first_pass(size=16, seed=0, start=5))
    assert torch.equal(joined(tail), joined(list(source.first_pass(size=16, seed=0)))[80:])


def test_an_iterable_itself_and_a_module_itself():
    source = opened(module=Net(), data=loader())
    assert torch.equal(blocks(source, n=1)[0].x, blocks(opened(data=loader), n=1)[0].x)


def test_a_training_stream_restarts_bit_for_bit():
    with ShuffledBatches(opened(), batch_size=7, block_size=12, seed=3, prefetch=1) as stream:
        run = [(next(stream).x, stream.position) for _ in range(60)]
    with ShuffledBatches(opened(), batch_size=7, block_size=12, seed=3, position=run[39][1]) as stream:
        for x, position in run[40:]:
            assert torch.equal(next(stream).x, x) and stream.position == position


def test_an_order_that_is_not_seeded_is_noticed():
    shuffled = opened(data=lambda: DataLoader(TensorDataset(ROWS), batch_size=4, shuffle=True))
    assert len(shuffled.warnings) == 1 and "another first batch" in shuffled.warnings[0]

    def seeded(seed):
        return DataLoader(
            TensorDataset(ROWS), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(seed)
        )

    assert opened(data=seeded).warnings == []


def test_passes_of_different_length_are_refused():
    lengths = itertools.count(6)
    source = opened(data=lambda split: [ROWS[:4]] * next(lengths))
    with pytest.raises(RunError, match="gave 9 training batches in pass 1 and 8 before. Give as many in each pass"):
        blocks(source, n=20, size=4)


def test_identity_follows_weights_and_data():
    def other():
        net = Net()
        net.head.weight.data[0, 0] += 1
        return net

    first = opened().identity()
    assert first == opened().identity()
    changed = [opened(module=other).identity(), opened(data=lambda: [ROWS[4:8]] * 3).identity()]
    assert (
        changed[0]["model_digest"] != first["model_digest"]
        and changed[1]["first_batch_digest"] != first["first_batch_digest"]
    )


def test_through_a_cache(tmp_path):
    direct = opened(data=loader)
    cached = CachedSource(ModuleSource(module=Net, data=loader, hook_point="body"), tmp_path / "cache")
    cached.open(device=CPU, dtype=torch.float32)
    assert torch.equal(joined(blocks(cached, "held_out")), joined(blocks(direct, "held_out")))
    stored = next(cached.blocks("train", size=1, seed=0))
    whole = torch.cat([b.x for b in direct.first_pass(size=100, seed=0)])
    assert sorted(map(tuple, stored.x.tolist())) == sorted(map(tuple, whole.tolist()))


def failing():
    raise ValueError("no weights here")


def narrow():
    return nn.Sequential(nn.Linear(2, 4))


def convolution():
    return nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Unflatten(2, (3, 1)))


ITERATOR = iter([ROWS[:4]] * 50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"module": "nothing"}, "^module: 'nothing' names nothing. Write package.module:function"),
        ({"module": "no_such_module:make"}, "'no_such_module' cannot be imported: No module named .* ./my_model.py"),
        ({"module": "torch.nn:Linaer"}, "^module: torch.nn has no 'Linaer'. Did you mean 'Linear'"),
        ({"module": "nowhere.py:make"}, "nowhere.py: there is no such file"),
        ({"module": failing}, r"failing failed: ValueError: no weights here \(.*test_module.py, line \d+\)"),
        ({"module": lambda: 3}, "gives int, not an nn.Module"),
        ({"data": lambda: 3}, "gives int; give an iterable of batches"),
        ({"data": list}, "gave no batch"),
        ({"data": lambda: ITERATOR}, "gave the same iterator a second time"),
        ({"hook_point": "bodi"}, "hook point 'bodi': .* Did you mean 'body'"),
        ({"hook_point": "pair"}, r"not one tensor. Name an item, for example pair\[0\]"),
        (
            {"module": convolution, "hook_point": "1"},
            r"the activation is float32 \[4, 1, 3, 1\]; .* \[n, T, d\] are needed",
        ),
        (
            {"data": lambda: [(ROWS[:4], 1.0, 2)]},
            r"cannot run on a batch of .* \(tuple .*\): TypeError.* in args, such as \[0\]",
        ),
        ({"module": narrow, "hook_point": "0"}, r"narrow cannot run on a batch .* \(float32 \[4, 3\]\): RuntimeError"),
        (
            {"data": lambda: [(ROWS[:4],)], "args": [1]},
            r"^args: a batch of .* has no item 1; it is tuple \[0\] float32",
        ),
        ({"data": lambda: [{"y": ROWS[:4]}], "args": ["x"]}, "^args: a batch of .* has no item 'x'"),
        ({"data": lambda: [ROWS[:4]], "args": [0]}, "^args: a batch of .* has no items. Leave args out"),
    ],
)
def test_what_cannot_be_used(options, message):
    with pytest.raises(UsageError, match=message):
        opened(**options)


def test_a_broken_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("x = 1\ny = undefined\n")
    with pytest.raises(UsageError, match=r"broken.py cannot be loaded: NameError: .* \(.*broken.py, line 2\)"):
        opened(module=f"{path}:make")


def files_of_the_page(tmp_path, monkeypatch):
    """The page's files, in a directory of their own."""
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    found = dict(re.findall(r'```\w+ title="([\w.]+)"\n(.*?)```', text, re.DOTALL))
    for name, content in found.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return found


SMALL = {"training.tokens": 2000, "training.batch_size": 100, "training.buffer": 512, "training.device": "cpu"}


def test_the_page_runs_as_it_stands_in_fifteen_lines(tmp_path, monkeypatch):
    files = files_of_the_page(tmp_path, monkeypatch)
    assert set(files) == {"my_model.py", "run.toml", "my_source.py", "sets.py", "sets.toml", "sentences.toml"}
    assert len([line for line in files["my_model.py"].splitlines() if line.strip()]) <= 15
    summary = saekit.run("run.toml", overrides={**SMALL, "evaluation.tokens": 1000}).summary
    assert summary["sae"]["d_in"] == 64 and summary["tokens"] == 2000 and summary["warnings"] == []
    assert summary["metrics"]["l0"] <= 8


def stored_weights(path):
    """What a safetensors file says of each tensor and its bytes of data. The rest of its header holds a checksum of cfg.json,
    which names the source."""
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    return {k: v for k, v in json.loads(whole[8:start]).items() if k != "__metadata__"}, whole[start:]


def test_the_pages_plugin_file_gives_the_same_run(tmp_path, monkeypatch):
    files_of_the_page(tmp_path, monkeypatch)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        first = saekit.run("run.toml", overrides=SMALL, directory="first")
        text = (tmp_path / "run.toml").read_text()
        start, end = text.index('use = "module"'), text.index("\n\n[architecture]")
        (tmp_path / "other.toml").write_text(text[:start] + 'use = "mine"' + text[end:])
        second = saekit.run("other.toml", overrides=SMALL, plugins=["my_source.py"], directory="second")
    finally:
        sys.modules.pop("my_model", None)
    (names, data), other = (stored_weights(run.directory / "sae" / "sae_weights.safetensors") for run in (first, second))
    assert {"W_enc", "W_dec"} <= names.keys() and (names, data) == other


def test_the_pages_sets_are_masked_pooled_labelled_and_shown(tmp_path, monkeypatch):
    files_of_the_page(tmp_path, monkeypatch)
    done = saekit.run("sets.toml", overrides={**SMALL, "evaluation.tokens": 500}, directory="run")
    assert any("auroc" in name for name in done.summary["metrics"])
    rows = json.loads((done.directory / "analysis" / "features" / "result.json").read_text())["tables"]["examples"]
    assert rows and all(row["example"]["kind"] == "set" and set(row["example"]["parts"]) <= set(ITEMS) for row in rows)


ITEMS = ["copper", "tin", "zinc", "lead", "salt", "sugar", "flour"]
