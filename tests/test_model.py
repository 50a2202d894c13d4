"""The Llama and its heads: invariants of the trunk, what heads share and what they own."""

import math

import pytest
import torch

from losses import Objective, all_losses
from model import ModelArgs, Transformer, rope_table, rotate

ARGS = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 31, "max_seq_len": 12}


def make(seed=0, **changes) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(ModelArgs(**ARGS | changes))


def tokens(B=2, T=10, seed=1):
    return torch.randint(0, 31, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("i", [0, 1, 2])
def test_no_head_sees_the_future(i):
    model, x = make(n_future_heads=2), tokens()
    changed = x.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 31
    a, b = (model.readouts(t, model.trunk(t), [i])[i].logits() for t in (x, changed))
    torch.testing.assert_close(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6], b[:, 6])


def test_forward_is_the_next_token_head():
    model, x = make(n_future_heads=1), tokens()
    z = model(x)
    assert z.shape == (2, 10, 31)
    torch.testing.assert_close(z, model.norm(model.trunk(x)) @ model.output.weight.T)
    assert not torch.allclose(z, model.readouts(x, model.trunk(x), [1])[1].logits())


def test_grouped_queries_are_full_attention_with_repeated_key_heads():
    grouped, full = make(n_kv_heads=2), make(n_kv_heads=4)
    state = grouped.state_dict()
    for name, w in state.items():
        if name.endswith(("wk.weight", "wv.weight")):
            state[name] = w.unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten(0, 1)  # head j reads j // 2
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(tokens()), full(tokens()))


def test_attention_depends_on_distance_alone():
    """RoPE: q at s and k at t meet in an angle of s - t."""
    cos, sin = rope_table(8, 30)
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(8, generator=g), torch.randn(8, generator=g)

    def meet(s, t):
        at = [rotate(v.view(1, 1, 1, 8), cos[p : p + 1], sin[p : p + 1]).flatten() for v, p in ((q, s), (k, t))]
        return torch.dot(*at)

    assert meet(7, 3) == pytest.approx(meet(29, 25).item(), abs=1e-5)
    assert meet(7, 3) != pytest.approx(meet(7, 4).item(), abs=1e-3)
    assert meet(0, 0) == pytest.approx(torch.dot(q, k).item(), abs=1e-5)


def test_rope_turns_neighbouring_pairs():
    """llama2.c's layout: (x[0], x[1]) by angle p, (x[2], x[3]) by p / 100 at head dim 4."""
    cos, sin = rope_table(4, 4)
    got = rotate(torch.tensor([1.0, 0, 1.0, 0]).view(1, 1, 1, 4), cos[3:], sin[3:]).flatten()
    want = [math.cos(3), math.sin(3), math.cos(0.03), math.sin(0.03)]
    torch.testing.assert_close(got, torch.tensor(want))


def test_names_and_sizes_of_the_trunk_are_those_of_llama2c():
    model = Transformer(ModelArgs())  # the published stories260K
    names = {"tok_embeddings.weight", "norm.weight", "output.weight"} | {
        f"layers.{layer}.{name}.weight" for layer in range(5) for name in (
            "attention.wq", "attention.wk", "attention.wv", "attention.wo", "attention_norm", "ffn_norm",
            "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")}
    assert set(model.state_dict()) == names
    assert model.args.hidden_dim == 172
    assert model.parameter_counts() == {"trunk": 260_032, "future heads": 0}
    assert ModelArgs(dim=288, n_heads=6, n_kv_heads=6, multiple_of=32).hidden_dim == 768  # stories15M


def test_tied_and_untied_embeddings():
    tied, untied = make(), make(tie_embeddings=False)
    assert tied.output.weight is tied.tok_embeddings.weight
    assert untied.output.weight is not untied.tok_embeddings.weight
    assert untied.parameter_counts()["trunk"] - tied.parameter_counts()["trunk"] == 31 * 16


def test_linear_heads_own_an_unembedding_each():
    model = make(n_future_heads=3)
    assert model.parameter_counts()["future heads"] == 3 * 31 * 16
    names = {n for n in model.state_dict() if n.startswith("future_heads.")}
    assert names == {f"future_heads.{i}.weight" for i in range(3)}
    weights = [head.weight for head in model.readouts(tokens(), model.trunk(tokens()), range(4)).values()]
    assert len({w.data_ptr() for w in weights}) == 4


def test_heads_do_not_change_how_the_trunk_starts():
    without, four = make(seed=5).state_dict(), make(seed=5, n_future_heads=4).state_dict()
    for name, w in without.items():
        assert torch.equal(w, four[name]), name
    assert not torch.equal(four["future_heads.0.weight"], four["future_heads.1.weight"])


def test_initial_weights():
    model = make(dim=64, n_heads=4, n_layers=8, vocab_size=512, n_future_heads=1)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
        else:
            residual = name.endswith(("wo.weight", "w2.weight"))
            assert p.std().item() == pytest.approx(0.02 / 4 if residual else 0.02, rel=0.05), name
    loss = Objective(model).evaluate(tokens(4, 12), tokens(4, 12, seed=2), all_losses(1))
    assert loss["ntp"].mean.item() == pytest.approx(math.log(512), abs=0.1)


def test_every_parameter_learns_when_every_loss_weighs():
    model = make(n_future_heads=2)
    Objective(model)(tokens(), tokens(seed=2), dict.fromkeys(all_losses(2), torch.tensor(0.1)))[0].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_future_losses_reach_the_trunk_but_not_the_ntp_heads_matrix_when_untied():
    model = make(n_future_heads=1, tie_embeddings=False)
    Objective(model)(tokens(), tokens(seed=2), {"nitp_1": torch.tensor(0.1)})[0].backward()
    assert model.output.weight.grad is None
    assert model.layers[0].attention.wq.weight.grad.abs().sum() > 0


def test_dropout_is_for_training_alone():
    model = make(dropout=0.5)
    assert not torch.allclose(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="dim=16"):
        make(n_heads=3)
    with pytest.raises(ValueError, match="n_kv_heads=3"):
        make(n_kv_heads=3)
    with pytest.raises(ValueError, match="head=deep"):
        make(head="deep")
    with pytest.raises(ValueError, match="max_seq_len is 12"):
        make()(tokens(T=13))
