"""Sites are where they say: compared with transformers' own hidden states and with TransformerLens."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from saekit.activations.sites import decoder_blocks, resolve, run_to_site
from saekit.errors import UsageError

TOKENS = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
BLOCKS = {"tiny_gpt2": "transformer.h", "tiny_llama": "model.layers", "tiny_gemma2": "model.layers"}


@pytest.fixture(params=list(BLOCKS))
def model(request):
    network = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(request.param)).eval()
    network.blocks_path = BLOCKS[request.param]
    return network.requires_grad_(False)


def read(model, name):
    return run_to_site(resolve(model, name), lambda: model(TOKENS))


def test_residual_sites_are_the_hidden_states_of_transformers(model):
    states = model(TOKENS, output_hidden_states=True).hidden_states
    for i in range(3):
        for name in (f"blocks.{i}.hook_in", f"blocks.{i}.hook_resid_pre", f"{model.blocks_path}.{i}:input"):
            assert torch.equal(read(model, name), states[i])
        for name in (f"blocks.{i}.hook_out", f"blocks.{i}.hook_resid_post", f"{model.blocks_path}.{i}"):
            out = read(model, name)
            if i == 2:  # transformers applies the final norm to the last of its hidden states
                norm = model.transformer.ln_f if "transformer" in model.blocks_path else model.model.norm
                out = norm(out)
            assert torch.equal(out, states[i + 1])


def test_stopping_runs_no_module_above_and_every_one_below(model):
    calls = []
    for number, block in enumerate(decoder_blocks(model)[1]):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append("head"))
    read(model, "blocks.1.hook_out")
    assert calls[:1] == [0] and not {2, "head"} & set(calls)
    calls.clear()
    read(model, "blocks.0.hook_in")
    assert calls == []


def test_a_submodule_that_gives_a_tuple_needs_an_item(model):
    attention = f"{model.blocks_path}.1." + ("attn" if "transformer" in model.blocks_path else "self_attn")
    with pytest.raises(UsageError, match=r"tuple \[0\] Tensor \[2, 20, 32\], \[1\] .*for example .*attn\[0\]"):
        read(model, attention)
    assert read(model, f"{attention}[0]").shape == (2, 20, 32)
    with pytest.raises(UsageError, match=r"no tensor \[5\]"):
        read(model, f"{attention}[5]")
    with pytest.raises(UsageError, match=r"Leave \[0\] out"):
        read(model, f"{model.blocks_path}.1.mlp[0]")


def test_replacing_by_the_same_changes_nothing_and_by_another_is_seen_above_only(model):
    plain = model(TOKENS).logits
    site = resolve(model, "blocks.1.hook_out")
    with site.replaced(lambda a: a.clone()):
        assert torch.equal(model(TOKENS).logits, plain)
    below = resolve(model, "blocks.0.hook_out")
    with site.replaced(lambda a: a + 1), below.capture() as seen:
        changed = model(TOKENS).logits
    assert not torch.allclose(changed, plain)
    assert torch.equal(seen.value, read(model, "blocks.0.hook_out"))
    with resolve(model, "blocks.1.hook_in").replaced(lambda a: a * 0), below.capture() as seen:
        model(TOKENS)
    assert torch.equal(seen.value, read(model, "blocks.0.hook_out"))


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_gone_after_an_exception(model):
    before = hooks_of(model)

    def fail(activation):
        raise RuntimeError("inside")

    for name in ("blocks.1.hook_out", "blocks.1.hook_in", f"{model.blocks_path}.1.mlp"):
        site = resolve(model, name)
        with pytest.raises(RuntimeError, match="inside"), site.replaced(fail):
            model(TOKENS)
        with pytest.raises(ValueError, match="inside"), site.capture():
            raise ValueError("inside")
        with pytest.raises(ZeroDivisionError):
            run_to_site(site, lambda: 1 / 0)
        run_to_site(site, lambda: model(TOKENS))
    assert hooks_of(model) == before


def test_a_replacement_of_another_shape_is_refused(model):
    site = resolve(model, "blocks.1.hook_out")
    with pytest.raises(UsageError, match=r"shape \[2, 19, 32\].*\[2, 20, 32\]"), site.replaced(lambda a: a[:, 1:]):
        model(TOKENS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.3.hook_out", "no block 3; the model has 3"),
        ("blocks.1.hook_outt", "Did you mean 'blocks.1.hook_out'"),
        ("blocks.x", "no such hook or submodule"),
        ("", "no such hook or submodule"),
        ("a:b:c", "no such hook or submodule"),
        ("lm_haed", "Did you mean 'lm_head'"),
    ],
)
def test_names_that_mean_nothing_are_refused_with_near_ones(model, name, message):
    with pytest.raises(UsageError, match=message):
        resolve(model, name)


Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Record:
    words: torch.Tensor
    note: str


class Odd(nn.Module):
    """Gives whatever it was told to, by a keyword argument alone."""

    def __init__(self, give):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.part = Part(give)

    def forward(self, x):
        return self.part(hidden=self.inner(x))


class Part(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.give = give

    def forward(self, *, hidden):
        return self.give(hidden)


@pytest.mark.parametrize(
    ("give", "item", "get"),
    [
        (lambda h: (None, h, "rest"), "1", lambda out: out[1]),
        (lambda h: [h, "rest"], "0", lambda out: out[0]),
        (lambda h: {"words": h, "note": "rest"}, "words", lambda out: out["words"]),
        (lambda h: Pair(h, "rest"), "0", lambda out: out.first),
        (lambda h: Record(h, "rest"), "words", lambda out: out.words),
    ],
)
def test_an_item_of_any_container_is_read_and_replaced_and_the_rest_is_kept(give, item, get):
    model = Odd(give)
    x = torch.randn(3, 4)
    plain = model(x)
    site = resolve(model, f"part[{item}]")
    assert torch.equal(run_to_site(site, lambda: model(x)), get(plain))
    with site.replaced(lambda a: a * 2):
        out = model(x)
    assert type(out) is type(plain)
    assert torch.equal(get(out), get(plain) * 2)
    assert "rest" in (out.values() if isinstance(out, dict) else vars(out).values() if isinstance(out, Record) else out)


def test_an_input_given_by_keyword_is_read_and_replaced():
    model = Odd(lambda h: h)
    x = torch.randn(3, 4)
    assert torch.equal(run_to_site(resolve(model, "part:input"), lambda: model(x)), model.inner(x))
    with resolve(model, "part:input[hidden]").replaced(torch.zeros_like):
        assert model(x).count_nonzero() == 0
    with pytest.raises(UsageError, match=r"no tensor \[other\].*\[hidden\] Tensor"):
        run_to_site(resolve(model, "part:input[other]"), lambda: model(x))


def test_a_module_that_is_never_called_is_an_error():
    model = Odd(lambda h: h)
    model.idle = nn.Linear(4, 4)
    with pytest.raises(UsageError, match="never calls this module"):
        run_to_site(resolve(model, "idle"), lambda: model(torch.randn(3, 4)))
    with resolve(model, "idle").capture() as seen:
        model(torch.randn(3, 4))
    with pytest.raises(UsageError, match="never calls this module"):
        _ = seen.value


def test_blocks_are_found_by_structure_and_doubt_is_an_error():
    def block():
        return nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Sequential(nn.Linear(4, 4))]))

    one = nn.ModuleDict({"stack": nn.ModuleList([block(), block()]), "norms": nn.ModuleList([nn.LayerNorm(4)] * 2)})
    assert decoder_blocks(one)[0] == "stack"
    two = nn.ModuleDict({"encoder": nn.ModuleList([block()]), "decoder": nn.ModuleList([block()])})
    with pytest.raises(UsageError, match=r"several lists.*encoder \(1 x Sequential\), decoder"):
        resolve(two, "blocks.0.hook_out")
    with pytest.raises(UsageError, match="no list of decoder blocks"):
        resolve(nn.Linear(2, 2), "blocks.0.hook_out")
    assert resolve(nn.Sequential(nn.Linear(2, 2)), "0").side == "output"
