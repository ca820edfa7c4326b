"""The recipe: its names are those of the sets, and it runs from preparation to report on a model of a few steps."""

import tomllib
from pathlib import Path

import saekit_gear
from saekit_gear import prepare
from saekit_gear.prepare import Training
from saekit_gear.sets import ARCHETYPES, CONCEPTS, ITEMS

import saekit

RECIPE = Path(saekit_gear.__file__).parent / "recipes" / "gear.toml"


def test_the_names_are_those_of_the_sets():
    recipe = tomllib.loads(RECIPE.read_text(encoding="utf-8"))
    assert recipe["source"]["concepts"] == list(CONCEPTS) and recipe["source"]["output_names"] == list(ITEMS)
    (intervene,) = (analyzer for analyzer in recipe["analyzer"] if analyzer["use"] == "intervene")
    assert intervene["targets"] == {name: list(core) for name, core in ARCHETYPES.items()}
    assert intervene["concepts"] == list(ARCHETYPES)


def test_it_runs_from_preparation_to_report(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "Training", lambda: Training(steps=3, batch=16, warm_up=2))
    made = prepare.trained
    monkeypatch.setattr(prepare, "trained", lambda training: made(training, directory=tmp_path / "cache"))
    small = {
        "architecture.d_sae": 64, "training.tokens": 1024, "training.batch_size": 256, "training.buffer": 512,
        "training.log_every": 4, "training.lr": 1e-3, "evaluation.tokens": 512, "callback": [], "analyzer.features.n_latents": 2,
        "analyzer.concept_recovery.tokens": 256, "analyzer.intervene.controls": 1, "analyzer.intervene.sequences": 1,
        "analyzer.intervene.training_tokens": 512, "analyzer.intervene.concepts": ["rusher"],
        "analyzer.intervene.targets": {"rusher": ["swim speed"]},
    }  # fmt: skip
    run = saekit.run("gear", overrides=small, directory=tmp_path / "run")
    found = saekit.Result.read(run.directory / "analysis" / "concept_recovery" / "result.json")
    assert [row["concept"] for row in found.tables["concepts"]] == list(CONCEPTS)
    features = saekit.Result.read(run.directory / "analysis" / "features" / "result.json")
    examples = [row["example"] for row in features.tables["examples"]]
    assert examples and all(example["kind"] == "set" and example["caption"] for example in examples)
    assert not any("at" in example for example in examples)  # the activation belongs to the whole set
    assert list((tmp_path / "cache").glob("gear-*.safetensors"))
