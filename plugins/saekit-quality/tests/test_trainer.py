from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from saekit_quality import ContrastiveQualityModel, ContrastiveTrainer
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from saekit import OptionError, UsageError

QUIET = {"disable_tqdm": True, "batch_size": 8, "epochs": 2, "learning_rate": 1e-3}


def trainer(place, train, val=None, criteria=2, **config):
    torch.manual_seed(0)
    model = ContrastiveQualityModel(model_name=str(place), num_labels=criteria, projection_dim=8)
    return ContrastiveTrainer(model, train, val, torch.device("cpu"), {**QUIET, **config})


def weights(found):
    return torch.cat([p.detach().flatten() for p in found.model.parameters()])


def test_epoch_by_epoch_is_the_same_as_all_at_once(roberta, kit) -> None:
    train, val = kit.loader(24, 2, 8), kit.loader(16, 2, 8, seed=1)
    single, all_at_once = trainer(roberta, train, val), trainer(roberta, train, val)
    results = [single.train_epoch(), single.train_epoch()]
    final = all_at_once.fit()
    assert torch.equal(weights(single), weights(all_at_once))
    assert [found["epoch"] for found in results] == [1, 2]
    assert results[1]["loss"] == final["loss"] and results[0]["loss"] != final["loss"]
    assert {"bce", "contrastive", "eval_loss", "eval_bce", "eval_contrastive", "batches_without_pair"} <= final.keys()
    assert final["eval_loss"] == pytest.approx(all_at_once.evaluate()["eval_loss"])
    assert final["eval_loss"] == pytest.approx(final["eval_bce"] + 0.1 * final["eval_contrastive"], rel=1e-5)
    with pytest.raises(UsageError, match="all 2 epochs are over. Raise config"):
        single.train_epoch()


def test_what_is_planted_is_learnt(roberta, kit) -> None:
    found = trainer(
        roberta, kit.loader(256, 2, 32), kit.loader(64, 2, 32, seed=1),
        batch_size=32, epochs=6, learning_rate=1e-2, save_strategy="no", eval_strategy="no",
    )  # fmt: skip
    before = found.evaluate()
    found.fit()
    after = found.evaluate()
    assert after["eval_bce"] < before["eval_bce"] - 0.1
    assert after["eval_contrastive"] < before["eval_contrastive"] - 0.1


def test_the_weight_of_the_contrastive_loss_rises(roberta, kit) -> None:
    found = trainer(roberta, kit.loader(32, 2, 8), lambda_warmup=0.5, lambda_contrastive=0.4)
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **others):
            found.model.train()
            seen.append(found._lambda())

    found.add_callback(Watch())
    found.fit()
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4])


def test_chunks_train_as_whole_batches_do(roberta, kit) -> None:
    """Without dropout, whose draws have another order."""
    found = []
    for chunk in (None, 3):
        one = trainer(roberta, kit.loader(24, 2, 8), epochs=1, chunk_size=chunk)
        for module in one.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        one.fit()
        found.append(weights(one))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_labels_alone_or_votes_alone_or_both(roberta, kit) -> None:
    rows = kit.responses(16, 2)
    shares = [{**row, "labels": row["votes"].nanmean(0)} for row in rows]
    alone = [{k: v for k, v in row.items() if k != "votes"} for row in shares]
    losses = [trainer(roberta, DataLoader(given, batch_size=8), epochs=1).fit()["loss"] for given in (rows, shares, alone)]
    assert losses[0] == losses[1] == losses[2]
    hard = trainer(roberta, DataLoader(rows, batch_size=8), epochs=1, targets="hard").fit()["loss"]
    assert hard != losses[0]


def test_training_stops_when_it_no_longer_helps(roberta, kit) -> None:
    """The transformers' own early stopping, with the best model kept."""
    found = trainer(roberta, kit.loader(16, 2, 8), kit.loader(16, 2, 8, seed=3), epochs=12, patience=1, learning_rate=0.05)
    final = found.fit()
    losses = [entry["eval_loss"] for entry in final["history"] if "eval_loss" in entry]
    assert len(losses) < 12
    assert found.evaluate()["eval_loss"] == pytest.approx(min(losses))


KILLED = """
    import os, signal, sys
    import pytest, torch
    sys.path[:0] = [{tests!r}]
    from conftest import responses
    from torch.utils.data import DataLoader
    from transformers import TrainerCallback
    from saekit_quality import ContrastiveQualityModel, ContrastiveTrainer

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads({threads})  # sums of another number of threads have other last bits
    torch.manual_seed(0)
    model = ContrastiveQualityModel(model_name={place!r}, num_labels=2, projection_dim=8)
    config = {{**{config!r}, "output_dir": {output!r}}}
    trainer = ContrastiveTrainer(model, DataLoader(responses(24, 2), batch_size=8, shuffle=True), None, "cpu", config)
    trainer.add_callback(Kill())
    trainer.fit()
"""


def test_killed_and_resumed_it_ends_with_the_same_bits(roberta, kit, tmp_path) -> None:
    """On one CPU process, in the middle of an epoch, with a loader that shuffles, dropout and chunks."""
    config = {**QUIET, "save_strategy": "steps", "save_steps": 2, "chunk_size": 5}
    undisturbed = trainer(roberta, kit.loader(24, 2, 8), **config)
    undisturbed.fit()
    script = KILLED.format(
        tests=str(__file__).rsplit("/", 1)[0],
        place=str(roberta),
        config=config,
        output=str(tmp_path / "out"),
        threads=torch.get_num_threads(),
    )
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"checkpoint-2", "checkpoint-4"}
    torch.manual_seed(77)  # nothing may depend on the state of the program that resumes
    resumed = trainer(roberta, kit.loader(24, 2, 8), **config, output_dir=str(tmp_path / "out"))
    resumed.fit(resume=True)
    assert torch.equal(weights(resumed), weights(undisturbed))


def test_fewer_labels_than_the_model_has(roberta, kit) -> None:
    with pytest.raises(UsageError, match="a batch has labels of 2 criteria, and the model was made with num_labels=9"):
        trainer(roberta, kit.loader(8, 2, 8), criteria=9).fit()
    rows = [{k: v for k, v in row.items() if k != "votes"} for row in kit.responses(8, 2)]
    with pytest.raises(UsageError, match="a batch has no 'labels' .* and no 'votes' "):
        trainer(roberta, DataLoader(rows, batch_size=8)).fit()


def test_a_batch_without_a_pair_trains_by_bce_alone(roberta, kit) -> None:
    row = kit.responses(1, 2)[0]
    final = trainer(roberta, DataLoader([row] * 3, batch_size=1), batch_size=1, epochs=1).fit()
    assert final["batches_without_pair"] == 1 and final["contrastive"] == 0 and final["bce"] > 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"batch_size": 16}, "batch_size: is 16, and train_loader gives batches of 8."),
        ({"epochs": 0}, "epochs: input should be greater than or equal to 1, got 0."),
        ({"lambda": 0.1}, "lambda: is not an option of ContrastiveTrainer or of transformers"),
        ({"learning_rat": 0.1}, "learning_rat: is not an option .* Did you mean learning_rate?"),
        ({"pairs": "same"}, "pairs: input should be 'majority', "),
        ({"pos_weight": [1.0]}, "pos_weight: has 1 values, and the model 2 criteria."),
        ({"patience": 1}, "patience: needs a val_loader"),
    ],
)
def test_configurations_that_cannot_be_used(roberta, kit, config, message) -> None:
    with pytest.raises(OptionError, match=message):
        trainer(roberta, kit.loader(8, 2, 8), **config)


def test_what_is_missing_is_named(roberta, kit, tmp_path) -> None:
    found = trainer(roberta, kit.loader(8, 2, 8), output_dir=str(tmp_path))
    with pytest.raises(UsageError, match="there is no val_loader to evaluate on"):
        found.evaluate()
    with pytest.raises(OptionError, match="resume: there is no checkpoint in "):
        found.fit(resume=True)
    with pytest.raises(OptionError, match="device: is cuda:3. Choose a GPU with CUDA_VISIBLE_DEVICES=3"):
        ContrastiveTrainer(found.model, kit.loader(8, 2, 8), None, "cuda:3", QUIET)
