"""Whatever a file holds or a user types, `saekit` ends with one message: see `sandbox.py` for what is asked of each input.

`make fuzz` draws ten thousand inputs; `make test` has a small and fixed share of them. The shares add up to 1.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import tomli_w
from fuzz.inputs import inputs
from fuzz.mutations import (
    JSON_VALUES,
    KEYS,
    ODD_TEXTS,
    TOML_VALUES,
    as_json,
    exchanged,
    spoilt,
    spoilt_json,
    spoilt_lines,
    spoilt_safetensors,
    torn,
)
from fuzz.sandbox import RUN, sandbox
from fuzz.valid import (
    ACTIVATIONS,
    LABELLED,
    LINES,
    PLUGIN,
    SPOILING_BY_LINE,
    SPOILING_LINES,
    TENSORS,
    TEXT,
    Files,
    activations,
    answers,
    run_table,
    run_tables,
    texts,
)
from hypothesis import strategies as st
from safetensors.torch import load, save

import saekit

LARGEST = 300  # the largest number in a run that is carried out, so that it ends


def toml(table: Any) -> bytes:
    """A run file; a table that TOML cannot hold is written as near to it as can be."""
    return tomli_w.dumps(table if isinstance(table, dict) else {"source": table}).encode("utf-8", "replace")


def spoilt_toml(table: Any) -> st.SearchStrategy[bytes]:
    """A run file that was spoilt before it was written or, one of five, after."""
    written = spoilt(table, TOML_VALUES).map(toml)
    return st.integers(0, 4).flatmap(lambda n: written if n else torn(toml(table)))


def beside() -> Files:
    """What the valid run files name."""
    return Files({ACTIVATIONS: activations(), LABELLED: as_json(answers()), **texts()})


@inputs(0.2, file=st.sampled_from(run_tables()).flatmap(spoilt_toml))
def test_run_files(file: bytes) -> None:
    with sandbox({**beside(), "run.toml": file}) as here:
        here.saekit("run", "run.toml", "--dry-run")


def small(value: Any) -> Any:
    """`value` without large numbers."""
    if isinstance(value, dict):
        return {key: small(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [small(inner) for inner in value]
    return min(value, LARGEST) if isinstance(value, int) and not isinstance(value, bool) else value


@inputs(0.04, table=st.sampled_from(run_tables()[:4]).flatmap(lambda t: spoilt(t, TOML_VALUES)).map(small))
def test_runs(table: Any) -> None:
    with sandbox({**beside(), "run.toml": toml(table)}) as here:
        here.saekit("run", "run.toml", "--directory", RUN, "-o", 'directory="runs"')


WORDS = st.sampled_from((*ODD_TEXTS, *KEYS)).filter(lambda text: "\0" not in text) | st.text(max_size=8).filter(
    lambda text: "\0" not in text
)
KEY = st.sampled_from(
    (
        "training.lr", "training.threads", "training", "loss", "loss.mse.weight", "loss.mse", "source.data",
        "variant.a.training.lr", "plugins", "architecture", "architecture.k", "", ".", "directory", "recipe", "metric",
        "analyzer.x.y", "graph.use", "evaluation.tokens",
    )
) | WORDS  # fmt: skip
OPTION = st.one_of(
    st.builds(lambda key, value: ["-o", f"{key}={value}"], KEY, WORDS | TOML_VALUES.map(str)),
    st.builds(lambda key, value: ["-o", f"{key}={value}"], KEY, TOML_VALUES.map(str)),
    st.builds(
        lambda section, name, key, value: [f"--{section}", f"{name}:{key}={value}"],
        st.sampled_from(("loss", "metric", "analyzer", "architecture", "source", "callback", "tracker", "graph")),
        st.sampled_from(("mse", "l1", "topk", "cosine", "features", "tensors")) | WORDS, KEY, WORDS,
    ),
    st.tuples(st.sampled_from(("--plugin", "--no-plugin", "--loss", "--directory", "-o")), WORDS).map(list),
)  # fmt: skip
OTHERS = st.builds(
    lambda command, words: [*command, *words],
    st.sampled_from(
        (
            ["plugins", "show"], ["check"], ["recipes"], ["report"], ["compare"], ["import"],
            ["export", "--to", "sae_lens"], ["doctor"], ["run"], ["run", "--dry-run"], ["run", "--resume"],
            ["plugins", "--plugin"], ["compare", "--metric"], [], ["schema"], ["bench"],
        )
    ),
    st.lists(WORDS, min_size=1, max_size=3),
)  # fmt: skip


@inputs(
    0.14,
    arguments=OTHERS
    | st.lists(OPTION, min_size=1, max_size=3).map(lambda given: ["run", "tiny.toml", "--dry-run", *chain(*given)]),
)
def test_the_command_line(arguments: list[str]) -> None:
    with sandbox({**beside(), "tiny.toml": toml(run_table())}) as here:
        if arguments[0:1] != ["run"] or "tiny.toml" in arguments or "--dry-run" in arguments or "--resume" in arguments:
            here.saekit(*arguments)
        else:  # a word that is a recipe would begin a run
            here.saekit(*arguments, "--dry-run")


@inputs(0.13, file=spoilt_json(answers()))
def test_labelled_json(file: bytes) -> None:
    from saekit_attribution.labelled_data.document import LabelledData

    with sandbox({LABELLED: file}) as here:
        here.run.mkdir()
        data = here.call(LabelledData.load, LABELLED)
        if data is not None:
            pairs = here.call(data.pairs)
            here.call(data.write, here.run / LABELLED, {pair.place: {"score": float("nan")} for pair in pairs})
            assert here.call(LabelledData.load, here.run / LABELLED) is not None


@inputs(0.02, data=st.data())
def test_state_of_a_checkpoint(data: st.DataObject, finished: Files) -> None:
    from saekit.training import checkpoint

    with sandbox({name: file for name, file in finished.items() if Path(name).name != "summary.json"}) as here:
        path = checkpoint.found(here.run / "checkpoints")[0]
        tensors, state = checkpoint.load(path)
        if data.draw(st.integers(0, 4)):
            state = data.draw(spoilt(state, JSON_VALUES))
            if not isinstance(state, dict):
                state = {"trainer": state}
            state = {key: value for key, value in state.items() if key not in ("format", "step", "sha256")}
            removed = data.draw(st.sets(st.sampled_from(sorted(tensors)), max_size=2))
            tensors = {name: tensor for name, tensor in tensors.items() if name not in removed}
            checkpoint.save(path.parent, 2, tensors, state, keep=1)
        else:
            name = data.draw(st.sampled_from((checkpoint.STATE, checkpoint.TENSORS)))
            (path / name).write_bytes(data.draw(torn((path / name).read_bytes())))
        here.saekit("run", "--resume", RUN)


@inputs(0.16, data=st.data())
def test_sae_directories(data: st.DataObject, finished: Files) -> None:
    cfg = json.loads(finished[f"{RUN}/sae/cfg.json"])
    weights = finished[f"{RUN}/sae/sae_weights.safetensors"]
    if data.draw(st.integers(0, 7)):  # otherwise the checksums in it stop nearly all of them
        weights = save(load(weights))
    form = data.draw(st.sampled_from(("ours", "sae_lens", "sparsify")))
    names = ("cfg.json", "sae_weights.safetensors")
    if form == "sae_lens":
        cfg["metadata"] = {"sae_lens_version": "6.0.0", "model_name": "m"}
    if form == "sparsify":
        cfg = {
            "activation": "topk",
            "expansion_factor": 2,
            "num_latents": 16,
            "k": 3,
            "d_in": 8,
            "skip_connection": False,
        }
        weights = _as_sparsify(weights)
        names = ("cfg.json", "sae.safetensors")
    written, tensors = as_json(cfg), weights
    if data.draw(st.booleans()):
        written = data.draw(spoilt_json(cfg))
    else:
        tensors = data.draw(spoilt_safetensors(weights))
    with sandbox({f"sae/{names[0]}": written, f"sae/{names[1]}": tensors}) as here:
        here.saekit("import", "sae", f"{RUN}/imported")
        here.call(saekit.load_sae, "sae")


def _as_sparsify(weights: bytes) -> bytes:
    tensors = load(weights)
    return save(
        {
            "encoder.weight": tensors["W_enc"].t().contiguous(),
            "encoder.bias": tensors["b_enc"],
            "W_dec": tensors["W_dec"],
            "b_dec": tensors["b_dec"],
        }
    )


@inputs(0.05, file=spoilt_safetensors(activations()), labels=st.booleans(), run=st.integers(0, 3))
def test_stored_activations(file: bytes, labels: bool, run: int) -> None:
    table = run_table()
    table["source"] = {**TENSORS, **({"labels": "labels"} if labels else {})}
    with sandbox({ACTIVATIONS: file, "run.toml": toml(table)}) as here:
        here.saekit("run", "run.toml", *(["--directory", RUN] if run == 0 else ["--dry-run"]))


@inputs(0.07, name=st.sampled_from((TEXT, LINES)), data=st.data())
def test_documents(name: str, data: st.DataObject) -> None:
    from saekit.activations.documents import read_documents

    content = texts()[name]
    if name == LINES and data.draw(st.booleans()):
        lines = [json.loads(line) for line in content.splitlines()]
        content = b"\n".join(as_json(line) for line in data.draw(spoilt(lines, JSON_VALUES).map(_listed)))
    else:
        content = data.draw(torn(content))
    unit = data.draw(st.sampled_from(("auto", "file", "line", "paragraph")))
    with sandbox({name: content}) as here:
        here.call(lambda: [*read_documents(name, unit=unit)])


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@inputs(0.03, data=st.data())
def test_labelled_texts(data: st.DataObject) -> None:
    from saekit.builtin.sources.labelled import LabelledSource

    lines = [json.loads(line) for line in texts()[LINES].splitlines()]
    content = b"\n".join(as_json(line) for line in data.draw(spoilt(lines, JSON_VALUES).map(_listed)))
    with sandbox({LINES: content}) as here:
        source = LabelledSource(model="m", hook_point="blocks.0.hook_out", data=LINES, labels=["good"], classes="kind")

        def read() -> None:
            source.concepts, labels = source._labels()
            source._count(labels)

        here.call(read)


@inputs(
    0.11,
    file=exchanged(PLUGIN, SPOILING_BY_LINE) | spoilt_lines(tuple(PLUGIN.strip().splitlines()), SPOILING_LINES),
    command=st.sampled_from(("list", "show", "json", "dry", "run", "check")),
)
def test_plugin_files(file: bytes, command: str) -> None:
    with sandbox({**beside(), "evil.py": file, "run.toml": toml(run_table())}) as here:
        used = ["--loss", "hostile", "--callback", "listener", "--metric", "measure", "--plugin", "evil.py"]
        arguments = {
            "list": ["plugins", "--plugin", "evil.py"],
            "show": ["plugins", "--plugin", "evil.py", "show", "hostile"],
            "json": ["plugins", "--plugin", "evil.py", "show", "hostile", "--json"],
            "dry": ["run", "run.toml", "--dry-run", *used],
            "run": ["run", "run.toml", "--directory", RUN, *used],
            "check": ["check", "--plugin", "evil.py", "hostile"],
        }
        here.saekit(*arguments[command])


@inputs(0.05, data=st.data())
def test_files_of_a_finished_run(data: st.DataObject, finished: Files) -> None:
    files = Files(finished)
    names = [
        name
        for name in files
        if name.endswith((".json", ".jsonl", ".toml")) and "checkpoints" not in name and "/sae/" not in name
    ]
    name = data.draw(st.sampled_from(sorted(names)))
    if name.endswith(".json") and data.draw(st.integers(0, 3)):
        files[name] = data.draw(spoilt_json(json.loads(files[name])))
    elif name.endswith(".jsonl") and data.draw(st.integers(0, 3)):
        lines = [json.loads(line) for line in files[name].splitlines()]
        files[name] = b"\n".join(as_json(line) for line in _listed(data.draw(spoilt(lines, JSON_VALUES))))
    else:
        files[name] = data.draw(torn(files[name]))
    command = data.draw(
        st.sampled_from(
            ("report", "compare", "compare --json", "compare --all", "run --resume", "export --to sae_lens")
        )
    )
    with sandbox(files) as here:
        target = [f"{RUN}/exported"] if command.startswith("export") else []
        here.saekit(*command.split(), RUN, *target)
