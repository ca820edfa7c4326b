"""The cache gives back what the source gives, bit for bit, belongs to one source alone, and survives a kill."""

import contextlib
import json
import textwrap
import time
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

import saekit
from saekit.activations import cache, cache_files
from saekit.activations.batch import Activations
from saekit.activations.cache import CachedSource
from saekit.activations.shuffle import ShuffledBatches
from saekit.builtin.sources import LabelledSource, SyntheticSource, TextSource
from saekit.errors import RunError, UsageError
from saekit.seeds import derived_seed
from saekit.testing.tiny import forkserver

CPU = torch.device("cpu")
COLUMNS = ("x", "tokens", "sequence", "position")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "_SHARD_ROWS", (150, 150))
    monkeypatch.setattr(cache_files, "CHUNK", 32)


def text(model, data, **options):
    return TextSource(
        model=str(model),
        data=str(data),
        **{"hook_point": "blocks.1.hook_out", "context": 16, "rows": 4, "held_out": 0.2, **options},
    )


def opened(source):
    source.open(device=CPU, dtype=torch.float32)
    return source


def everything(blocks):
    return Activations.join(list(blocks))


def ordered(block):
    """The rows by the place that they came from."""
    return block.rows((block.sequence * 1000 + block.position).argsort())


def same(a, b, columns=COLUMNS):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in columns)


@pytest.fixture
def direct(tiny_gpt2, text_file):
    return opened(text(tiny_gpt2, text_file))


@pytest.fixture
def cached(tiny_gpt2, text_file, tmp_path):
    source = opened(CachedSource(text(tiny_gpt2, text_file), tmp_path / "cache"))
    source.fill()
    return source


def again(tiny_gpt2, text_file, tmp_path, **options):
    return CachedSource(text(tiny_gpt2, text_file, **options), tmp_path / "cache")


def test_one_pass_of_training_data_bit_for_bit(direct, cached):
    whole = everything(direct.first_pass(size=150, seed=0))
    assert whole.sequence.unique().numel() == direct._splits["train"].count
    size = sum(len(b) for b in direct.blocks("held_out", size=10**6, seed=0))
    stored = cached._stored["train"]
    n = sum(len(shard["x"]) for shard in stored)
    assert n == len(whole) and len(stored) > 5 and size > 0
    passes = cached.blocks("train", size=32, seed=3)
    height = -(-150 // 32)  # chunks of a shard: the last one of each is short
    chunks = sum(-(-len(shard["x"]) // 32) for shard in stored)
    assert chunks > height
    one = everything(next(passes) for _ in range(chunks))
    assert same(ordered(one), whole)
    other = everything(next(passes) for _ in range(chunks))
    assert same(ordered(other), whole) and not torch.equal(one.x, other.x)


def test_a_shard_is_a_block_of_the_source_shuffled(direct, cached, tmp_path):
    for number, block in enumerate(direct.first_pass(size=150, seed=0)):
        shard = load_file(tmp_path / "cache" / f"train-{number:05d}.safetensors")
        order = torch.randperm(len(block), generator=torch.Generator().manual_seed(derived_seed("cache", number)))
        assert all(torch.equal(shard[name], getattr(block, name)[order].to(shard[name].dtype)) for name in COLUMNS)
        assert len(torch.unique_consecutive(shard["sequence"])) > 0.7 * len(shard["sequence"])


def test_held_out_data_is_in_order_bit_for_bit(direct, cached):
    for size in (10, 64, 10**6):
        found = everything(cached.blocks("held_out", size=size, seed=5))
        assert same(found, everything(direct.blocks("held_out", size=150, seed=0)))
    assert (cached.d_in, cached.d_out, cached.hook_point) == (32, 32, "blocks.1.hook_out")


def test_targets_and_labels_are_kept(tiny_llama, tmp_path):
    records = [{"text": f"text number {i} " * 3, "y": [0, 1, None][i % 3]} for i in range(40)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in records))
    options = {
        "model": str(tiny_llama),
        "data": str(data),
        "labels": ["y"],
        "hook_point": "blocks.1.hook_in",
        "target_hook_point": "blocks.1.hook_out",
        "context": 16,
        "held_out": 0.2,
    }
    direct = opened(LabelledSource(**options))
    cached = opened(CachedSource(LabelledSource(**options), tmp_path / "cache"))
    assert cached.concepts == ["y"] and cached.warnings == direct.warnings != []
    found, wanted = (everything(s.blocks("held_out", size=150, seed=0)) for s in (cached, direct))
    assert same(found, wanted, (*COLUMNS, "target")) and torch.equal(
        found.labels.nan_to_num(7), wanted.labels.nan_to_num(7)
    )
    assert not torch.equal(found.x, found.target)
    assert torch.equal(cached.sequences("train", 3, 0, 5).x, direct.sequences("train", 3, 0, 5).x)
    later = opened(CachedSource(LabelledSource(**options), tmp_path / "cache"))
    assert later.concepts == ["y"] and later.warnings == direct.warnings and not later._opened
    assert torch.equal(later.sequences("train", 3, 0, 5).x, direct.sequences("train", 3, 0, 5).x)


def test_a_written_cache_is_read_without_a_model(cached, direct, tiny_gpt2, text_file, tmp_path, monkeypatch):
    later = again(tiny_gpt2, text_file, tmp_path)
    loads = []
    monkeypatch.setattr(
        TextSource,
        "open",
        lambda self, *, device, dtype, kept=TextSource.open: (loads.append(1), kept(self, device=device, dtype=dtype)),
    )
    opened(later)
    block = next(later.blocks("held_out", size=64, seed=0))
    assert later.token_strings(block.tokens) == direct.token_strings(block.tokens)
    assert later.identity() == cached.identity() and later.special_tokens == [0, 1]
    assert later.missing == 0 and "is read" in later.peek()["cache"] and not loads
    batch = next(later.token_batches("held_out", rows=2))
    assert torch.equal(batch.tokens, next(direct.token_batches("held_out", rows=2)).tokens)
    assert later.subject.logits(batch).shape[0] == 2
    assert len(loads) == 1


def test_capabilities_are_those_of_the_source(cached, tmp_path):
    assert hasattr(cached, "token_batches") and not hasattr(cached, "sequences") and set(cached.withheld) == {"target"}
    synthetic = SyntheticSource(d_in=8, n_features=4, probability=0.1, held_out=100)
    source = opened(CachedSource(synthetic, tmp_path / "other", tokens=400))
    assert not hasattr(source, "token_strings") and set(source.withheld) == {"labels", "sequences"}
    assert torch.equal(source.truth, synthetic.truth)
    assert sum(map(len, source.blocks("held_out", size=64, seed=0))) == 100
    trained = sum(len(shard["x"]) for shard in source._stored["train"])
    assert trained == 1024  # the block that held the last of the 400


def test_examples_are_the_source_s_own_unless_their_tokens_are_in_the_cache(cached, tmp_path):
    assert not hasattr(cached, "examples")  # shown from the cached tokens, without loading a tokenizer

    class Shown(SyntheticSource):
        def examples(self, sequence, position):
            return [f"row {n}" for n in sequence.tolist()]

    source = opened(CachedSource(Shown(d_in=8, n_features=4, probability=0.1, held_out=100), tmp_path / "other", tokens=400))
    assert source.examples(torch.tensor([3, 1]), torch.tensor([0, 0])) == ["row 3", "row 1"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tiny_gpt2, text_file, tmp_path, direct, dtype):
    source = opened(CachedSource(text(tiny_gpt2, text_file), tmp_path / "half", dtype=dtype))
    found, wanted = (everything(s.blocks("held_out", size=150, seed=0)) for s in (source, direct))
    assert found.x.dtype == torch.float32
    assert torch.equal(found.x, wanted.x.to(getattr(torch, dtype)).float())
    assert same(found, wanted, COLUMNS[1:])
    assert source.identity() != direct.identity()


def test_what_does_not_fit_into_float16_is_refused(tmp_path):
    huge = SyntheticSource(d_in=4, n_features=4, probability=0.5, low=1e5, high=1e6)
    source = opened(CachedSource(huge, tmp_path / "cache", dtype="float16", tokens=100))
    with pytest.raises(UsageError, match=r"do not fit into float16. Set source.cache_dtype = .bfloat16"):
        source.fill()


def test_a_training_stream_restarts_bit_for_bit(cached, tiny_gpt2, text_file, tmp_path):
    with ShuffledBatches(cached, batch_size=48, block_size=128, seed=3, prefetch=1) as stream:
        run = [(next(stream), stream.position) for _ in range(60)]  # several passes
    later = opened(again(tiny_gpt2, text_file, tmp_path))
    with ShuffledBatches(later, batch_size=48, block_size=128, seed=3, position=run[29][1]) as stream:
        for batch, position in run[30:]:
            assert same(next(stream), batch) and stream.position == position


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hook_point": "blocks.0.hook_out"}, ["hook_point was 'blocks.1.hook_out' and is 'blocks.0.hook_out'"]),
        ({"context": 32}, ["context was 16 and is 32"]),
        ({"drop_first": False}, ["drop_first was True and is False"]),
        ({"target_hook_point": "blocks.2.hook_out"}, ["target_hook_point was not given and is"]),
        ({"held_out": 0.3}, ["held_out was 0.2 and is 0.3"]),
        ({"limit": 30}, ["data_digest was"]),
    ],
)
def test_other_options_are_refused_by_name(cached, tiny_gpt2, text_file, tmp_path, change, words):
    with pytest.raises(UsageError) as caught:
        opened(again(tiny_gpt2, text_file, tmp_path, **change))
    assert [word for word in ["holds other activations", *words] if word not in str(caught.value)] == []


def test_another_model_other_data_and_another_dtype_are_refused(cached, tiny_gpt2, tiny_llama, text_file, tmp_path):
    with pytest.raises(UsageError, match="model_digest was"):
        opened(again(tiny_llama, text_file, tmp_path))
    changed = tmp_path / "text.txt"
    changed.write_text(text_file.read_text() + "\n\nOne more paragraph.")
    with pytest.raises(UsageError, match="data_digest was"):
        opened(again(tiny_gpt2, changed, tmp_path))
    for options, message in (
        ({"dtype": "float16"}, "was written with source.cache_dtype 'float32', not 'float16'"),
        ({"tokens": 100}, "was written with source.cache_tokens left out, not 100"),
    ):
        with pytest.raises(UsageError, match=message):
            opened(CachedSource(text(tiny_gpt2, text_file), tmp_path / "cache", **options))


def test_weights_that_changed_in_place_are_noticed(tiny_gpt2, text_file, tmp_path):
    import shutil

    from safetensors.torch import save_file

    model = shutil.copytree(tiny_gpt2, tmp_path / "model")
    opened(CachedSource(text(model, text_file), tmp_path / "cache")).fill()
    opened(CachedSource(text(model, text_file), tmp_path / "cache"))
    weights = load_file(model / "model.safetensors")
    weights["transformer.wpe.weight"][0, 0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="model_digest was"):
        opened(CachedSource(text(model, text_file), tmp_path / "cache"))


def test_the_same_model_and_text_in_other_files_are_accepted(cached, tiny_gpt2, text_file, tmp_path):
    import shutil

    model = shutil.copytree(tiny_gpt2, tmp_path / "moved")
    data = tmp_path / "copied.txt"
    data.write_text(text_file.read_text() + "\n\n\n")  # other bytes, the same documents
    source = opened(CachedSource(text(model, data), tmp_path / "cache"))
    assert source.missing == 0 and same(*(next(s.blocks("train", size=64, seed=0)) for s in (source, cached)))


def test_a_shard_that_is_cut_short_or_missing_is_named_and_can_be_written_again(
    cached, tiny_gpt2, text_file, tmp_path, direct
):
    path = tmp_path / "cache" / "train-00002.safetensors"
    content = path.read_bytes()
    for damage, what in ((lambda: path.write_bytes(content[:-10]), "bytes of"), (path.unlink, "is missing")):
        damage()
        with pytest.raises(UsageError, match=rf"train-00002.safetensors: .*{what}.* Remove .*index.json"):
            opened(again(tiny_gpt2, text_file, tmp_path))
    (tmp_path / "cache" / "index.json").unlink()
    source = opened(again(tiny_gpt2, text_file, tmp_path))
    assert source.missing > 0
    source.fill()
    assert path.read_bytes() == content


def test_a_shard_that_is_cut_short_while_the_cache_is_unfinished_is_named(cached, tiny_gpt2, text_file, tmp_path):
    (tmp_path / "cache" / "index.json").unlink()
    path = tmp_path / "cache" / "train-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UsageError, match=r"train-00001.safetensors: is truncated"):
        opened(again(tiny_gpt2, text_file, tmp_path)).fill()


def test_directories_that_are_no_cache(tiny_gpt2, text_file, tmp_path):
    source = text(tiny_gpt2, text_file)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file. Name a directory"):
        opened(CachedSource(source, tmp_path / "file"))
    with pytest.raises(UsageError, match="holds files, but not a cache"):
        opened(CachedSource(source, tiny_gpt2))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "source.json").write_text('{"format": 99}')
    with pytest.raises(UsageError, match="has format 99"):
        opened(CachedSource(source, tmp_path / "cache"))
    (tmp_path / "cache" / "source.json").write_text("{")
    with pytest.raises(UsageError, match="source.json: cannot be read"):
        opened(CachedSource(source, tmp_path / "cache"))


def test_data_without_an_end_needs_a_number(tmp_path):
    synthetic = SyntheticSource(d_in=8, n_features=4, probability=0.1)
    with pytest.raises(UsageError, match="has no end. Say how much to keep: source.cache_tokens"):
        CachedSource(synthetic, tmp_path / "cache").peek()
    assert "is written first" in CachedSource(synthetic, tmp_path / "cache", tokens=100).peek()["cache"]


def test_too_little_room_is_seen_before_anything_is_written(tiny_gpt2, text_file, tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UsageError, match=r"GB of room, and the cache takes .* Set source.cache_tokens or"):
        opened(again(tiny_gpt2, text_file, tmp_path)).fill()
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def content(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "lock"}


def test_writing_that_failed_goes_on_where_it_stopped(cached, tiny_gpt2, text_file, tmp_path, monkeypatch):
    whole = content(tmp_path / "cache")
    harvested = []
    block = TextSource._block

    def failing(self, available, numbers, seed):
        harvested.append(int(numbers[0]))
        if len(harvested) == 5:
            raise RunError("the model has had enough")
        return block(self, available, numbers, seed)

    monkeypatch.setattr(TextSource, "_block", failing)
    with pytest.raises(RunError, match="enough"):
        opened(CachedSource(text(tiny_gpt2, text_file), tmp_path / "second")).fill()
    done = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "second").glob("*.safetensors")}
    assert 2 <= len(done) < len(whole) - 3 and not (tmp_path / "second" / "index.json").exists()
    first_time = set(harvested[1:-1])
    harvested.clear()
    harvested += [0] * 10  # past the failure
    source = opened(CachedSource(text(tiny_gpt2, text_file), tmp_path / "second"))
    seen = []
    source.fill(seen.append)
    assert seen == sorted(seen) and seen[-1] > 0
    assert content(tmp_path / "second") == whole
    assert {name: (tmp_path / "second" / name).stat().st_mtime_ns for name in done} == done
    assert not first_time & set(harvested[11:-2]) - {0}  # 0 again in the sample and in the held-out rows


WRITER = """
    import time
    import torch
    from saekit.activations import cache
    from saekit.builtin.sources import SyntheticSource

    class Slow(SyntheticSource):
        def blocks(self, split, *, size, seed, start=0):
            for block in super().blocks(split, size=size, seed=seed, start=start):
                yield block
                time.sleep(pause)

    cache._SHARD_ROWS = (2048, 2048)
    source = cache.CachedSource(Slow(d_in=16, n_features=8, probability=0.1, held_out=3000), directory, tokens=20_000)
    source.open(device=torch.device("cpu"), dtype=torch.float32)
    source.fill()
"""


def writing(directory, pause):
    process = forkserver().Process(target=exec, args=(textwrap.dedent(WRITER), {"directory": directory, "pause": pause}))
    process.start()
    return process


def written(directory, *processes):
    for process in processes or [writing(directory, 0)]:
        process.join(60)
        assert process.exitcode == 0
    return content(directory)


def test_a_kill_between_shards_leaves_whole_ones_and_the_rest_is_added(tmp_path):
    whole, killed = written(tmp_path / "whole"), tmp_path / "killed"
    writer = writing(killed, 0.3)
    deadline = time.monotonic() + 60
    while len(list(killed.glob("train-*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    writer.kill()
    writer.join()
    done = {p.name: p.stat().st_mtime_ns for p in killed.glob("*.safetensors")}
    assert 3 <= len(done) < 10 and not (killed / "index.json").exists()
    assert written(killed) == whole
    assert {name: (killed / name).stat().st_mtime_ns for name in done} == done


def test_two_processes_write_one_cache(tmp_path):
    cache = tmp_path / "cache"
    assert written(cache, writing(cache, 0.05), writing(cache, 0.05)) == written(tmp_path / "whole")


def run_file(tmp_path, model, data, **changes):
    table = {
        "source": {
            "use": "text",
            "model": str(model),
            "data": str(data),
            "hook_point": "blocks.1.hook_out",
            "context": 32,
            "held_out": 0.2,
            "cache": str(tmp_path / "cache"),
            **changes,
        },
        "architecture": {"use": "topk", "d_sae": 64, "k": 4},
        "loss": [{"use": "mse"}],
        "metric": [{"use": "token_sparsity"}],
        "analyzer": [{"use": "features", "n_latents": 2}],
        "training": {"tokens": 640, "batch_size": 64, "buffer": 256, "checkpoint_every": 4, "device": "cpu"},
        "evaluation": {"tokens": 300},
    }
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    return path


def test_runs_share_a_cache(tiny_gpt2, text_file, tmp_path, monkeypatch):
    path = run_file(tmp_path, tiny_gpt2, text_file)
    first = saekit.run(path, directory=tmp_path / "first")
    assert first.summary["seconds"]["harvest"] > 0
    monkeypatch.setattr(TextSource, "open", None)  # nothing of the second run needs the model
    second = saekit.run(path, directory=tmp_path / "second")
    other = saekit.run(path, directory=tmp_path / "third", overrides={"training.seed": 1})
    weights = [(run.directory / "sae" / "sae_weights.safetensors").read_bytes() for run in (first, second, other)]
    assert weights[0] == weights[1] != weights[2]
    assert first.summary["metrics"] == second.summary["metrics"]
    provenance = json.loads((second.directory / "provenance.json").read_text())
    assert provenance["source"]["cache"] == {"dtype": "float32", "tokens": None}


def test_an_interrupted_run_goes_on_from_the_cache_wherever_it_lies_now(tiny_gpt2, text_file, tmp_path, monkeypatch):
    path = run_file(tmp_path, tiny_gpt2, text_file)
    whole = saekit.run(path, directory=tmp_path / "whole")
    from saekit.runner.run import Run

    save = Run._checkpoint

    def stop(self, number, position):
        save(self, number, position)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, contextlib.suppress(saekit.SaekitError):
        patched.setattr(Run, "_checkpoint", stop)
        saekit.run(path, directory=tmp_path / "cut")
    (tmp_path / "cache").rename(tmp_path / "moved")
    toml = tmp_path / "cut" / "run.toml"
    toml.write_text(toml.read_text().replace(str(tmp_path / "cache"), str(tmp_path / "moved")))
    from saekit.api import resume

    resumed = resume(str(tmp_path / "cut"))
    weights = [(run.directory / "sae" / "sae_weights.safetensors").read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]
    assert not (tmp_path / "cache").exists()


def test_options_of_the_cache_without_a_cache(tiny_gpt2, text_file, tmp_path):
    path = run_file(tmp_path, tiny_gpt2, text_file, cache_tokens=100)
    path.write_text(
        "".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("cache = "))
    )
    with pytest.raises(UsageError, match="source.cache_tokens: is of no use without source.cache"):
        saekit.run(path, directory=tmp_path / "run")


def test_the_block_of_a_seed_is_a_function_of_seed_and_number(cached):
    blocks = cached.blocks("train", size=100, seed=4)
    running = [next(blocks) for _ in range(12)]
    for start in (0, 3, 11):
        assert same(next(cached.blocks("train", size=100, seed=4, start=start)), running[start])
    assert not same(next(cached.blocks("train", size=100, seed=5)), running[0])


def test_no_shard_stays_mapped(cached, tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the mapped files of a process are listed on Linux")
    held = next(cached.blocks("train", size=100, seed=0))
    assert len(held) and str(tmp_path) not in maps.read_text()
