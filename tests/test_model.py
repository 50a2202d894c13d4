"""The Llama and its heads: invariants of the trunk, what heads share and what they own."""

import math

import pytest
import torch

from losses import Objective, all_losses
from model import FUTURE_HEADS, HEADS, ModelArgs, Transformer, rope_table, rotate
from step import kernels
from text.letters import Letters, alphabet_size

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
    torch.testing.assert_close(z, model.norm(model.trunk(x).last) @ model.output.weight.T)
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
    """RoPE: the angle between q at s and k at t depends on s - t."""
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


ALL_HEADS = {"n_future_heads": 3, "spelling_letters": 2, "alphabet_size": 5, "order_window": 4}


@pytest.mark.parametrize("head", FUTURE_HEADS)
def test_heads_do_not_change_how_the_trunk_starts(head):
    without, with_heads = make(seed=5).state_dict(), make(seed=5, head=head, **ALL_HEADS).state_dict()
    for name, w in without.items():
        assert torch.equal(w, with_heads[name]), name
    for name in with_heads.keys() - without.keys():
        assert name.startswith(HEADS)
        if name.startswith("future_heads.0") and "norm" not in name and "residual" not in name:
            assert not torch.equal(with_heads[name], with_heads[name.replace(".0.", ".1.", 1)]), name


@pytest.mark.parametrize("head,own", [("linear", 31 * 16), ("residual", 16 * 16), ("shared", 0)])
def test_parameters_of_a_head(head, own):
    counts = make(head=head, n_future_heads=3).parameter_counts()
    assert counts == {"trunk": make().parameter_counts()["trunk"], "future heads": 3 * own}


def test_a_residual_head_starts_as_the_next_token_head():
    model, x = make(head="residual", n_future_heads=1), tokens()
    torch.testing.assert_close(model.readouts(x, model.trunk(x), [1])[1].logits(), model(x))
    with torch.no_grad():
        model.future_heads[0].residual.weight.normal_()
    states = model.trunk(x)
    h = states.last
    moved = h @ model.future_heads[0].residual.weight.T
    want = model.norm(h + moved * torch.sigmoid(moved)) @ model.output.weight.T
    torch.testing.assert_close(model.readouts(x, states, [1])[1].logits(), want)


def test_a_block_head_is_one_more_layer():
    model, x = make(head="block", n_future_heads=1), tokens()
    deeper = make(n_layers=3)
    state = {name: w for name, w in model.state_dict().items() if not name.startswith(HEADS)}
    state |= {f"layers.2.{name}": w for name, w in model.future_heads[0].block.state_dict().items()}
    deeper.load_state_dict(state)
    torch.testing.assert_close(model.readouts(x, model.trunk(x), [1])[1].logits(), deeper(x))


def test_a_sequential_head_reads_the_tokens_in_between_and_the_head_before():
    """By hand, position by position of DeepSeek-V3's equations: the input of depth i at t is x[t+i]."""
    model, x = make(head="sequential", n_future_heads=2), tokens(1, 8)
    states = model.trunk(x).last
    for i, head in enumerate(model.future_heads, 1):
        length = 8 - i
        both = [torch.cat((head.state_norm(states[0, t]), head.token_norm(model.tok_embeddings(x[0, t + i]))))
                for t in range(length)]
        inputs = (torch.stack(both) @ head.project.weight.T)[None]
        states = head.block(inputs, model.rope_cos[:length], model.rope_sin[:length])
        want = model.norm(states) @ model.output.weight.T
        got = model.readouts(x, model.trunk(x), [i])[i].logits()  # the heads before are run unasked
        torch.testing.assert_close(got[:, :length], want)


@pytest.mark.parametrize("head", FUTURE_HEADS)
def test_what_a_head_may_see(head):
    """Head i at t sees x[0..t], a sequential one x[0..t+i], and nothing later."""
    model, x = make(head=head, n_future_heads=2), tokens(1, 10)
    with torch.no_grad():
        for p in model.future_heads.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    for i in (1, 2):
        last = 5 + (i if head == "sequential" else 0)  # the last token that position 5 may see
        for changed in (last, last + 1):
            other = x.clone()
            other[0, changed] = (other[0, changed] + 1) % 31
            a, b = (model.readouts(t, model.trunk(t), [i])[i].logits()[0, 5] for t in (x, other))
            assert torch.allclose(a, b, atol=1e-6) == (changed > last)


def total(objective, x, y, names) -> torch.Tensor:
    """The sum of these losses, each position weighing 0.1."""
    return objective(x, objective.targets(y, tuple(names)), torch.full((len(names),), 0.1))[0]


def gradients(model, names, x=None, **options) -> dict[str, torch.Tensor]:
    """Of the sum of these losses, by parameter; those that it does not reach are left out."""
    x = tokens() if x is None else x
    model.zero_grad()
    objective = Objective(model, **{"letters": (Letters([b"ab"] * 31, "lower"), 2), "order_window": 4} | options)
    total(objective, x, tokens(*x.shape, seed=2), names).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def lab(head, **changes) -> Transformer:
    model = make(head=head, **ALL_HEADS | {"alphabet_size": alphabet_size("lower")} | changes)
    with torch.no_grad():  # away from special starts
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


LOSSES = all_losses(3, letters=2, order=True)


@pytest.mark.parametrize("head", FUTURE_HEADS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_reaches_the_trunk_and_its_own_head_and_nothing_else(loss, head):
    model = lab(head)
    kind, i = loss.split("_") if "_" in loss else (loss, "0")
    heads = range(1 if head == "sequential" else int(i), int(i) + 1)
    own = {"ntp": ("none",), "spelling": ("spelling_heads.",), "order": ("order_head.",)}.get(
        kind, tuple(f"future_heads.{j - 1}." for j in heads))
    trunk = {name for name, _ in model.named_parameters() if not name.startswith(HEADS)}
    reached = set(gradients(model, [loss]))
    assert reached - trunk == {name for name, _ in model.named_parameters() if name.startswith(own)}
    assert trunk <= reached  # tied: the embedding at least


@pytest.mark.parametrize("head", [h for h in FUTURE_HEADS if h != "shared"])
@pytest.mark.parametrize("loss", ["nitp_2", "consistency_2", "spelling_1", "order"])
def test_a_part_of_a_heads_gradient_reaches_the_trunk_and_all_of_it_the_head(loss, head):
    whole = gradients(lab(head), [loss])
    for part in (0.1, 0.0):
        found = gradients(lab(head, aux_grad_scale=part), [loss])
        for name, gradient in whole.items():
            if name.startswith(HEADS):
                torch.testing.assert_close(found[name], gradient)
            elif part:
                torch.testing.assert_close(found[name], part * gradient, rtol=1e-4, atol=1e-7)
            else:
                assert name not in found


def test_the_part_may_be_to_the_power_of_the_head():
    models = (lab("block", aux_grad_scale=part, aux_grad_power=True) for part in (1.0, 0.5))
    whole, found = (gradients(model, ["nitp_3"])["layers.0.attention.wq.weight"] for model in models)
    torch.testing.assert_close(found, 0.125 * whole)


def test_a_part_of_the_gradient_leaves_the_numbers_as_they_are():
    x = tokens()
    for head in FUTURE_HEADS:
        a, b = (m.readouts(x, m.trunk(x), [2])[2].logits() for m in (lab(head), lab(head, aux_grad_scale=0.3)))
        assert torch.equal(a, b) or head == "shared"


@pytest.mark.parametrize("head", ["block", "sequential"])
def test_blocks_of_heads_start_as_copies_of_the_last(head):
    model = make(head=head, n_future_heads=2)
    model.start_as_last_block([2])
    for name, w in model.layers[-1].state_dict().items():
        assert torch.equal(model.future_heads[1].block.state_dict()[name], w)
    assert not torch.equal(model.future_heads[0].block.attention.wq.weight, model.layers[-1].attention.wq.weight)


def test_a_copy_of_the_last_block_that_reads_what_it_reads_is_the_next_token_head():
    """So such a head starts at the NTP head's own distribution; one that reads its output starts anywhere."""
    x = tokens()
    for head_input in ("before_last", "last"):
        model = lab("block", head_input=head_input)
        model.start_as_last_block([2])
        same = torch.equal(model.readouts(x, model.trunk(x), [2])[2].logits(), model(x))
        assert same == (head_input == "before_last")
    model = lab("residual", head_input="before_last")
    states = model.trunk(x)
    want = states.before_last + torch.nn.functional.silu(model.future_heads[0].residual(states.before_last))
    torch.testing.assert_close(model.readouts(x, states, [1])[1].logits(), model.norm(want) @ model.output.weight.T)
    torch.testing.assert_close(model.layers[-1](states.before_last, *model.places(10, None)), states.last)


def test_matrices_of_the_trunk_may_be_bfloat16():
    """Norms and heads stay float32, and so does the residual stream; products want autocast."""
    wide, model, x = lab("block"), lab("block", param_dtype="bfloat16"), tokens()
    model.load_state_dict(wide.state_dict())
    types = {name: p.dtype for name, p in model.named_parameters()}
    for name, dtype in types.items():
        of_trunk = not name.startswith(HEADS) and not name.endswith("norm.weight")
        assert dtype == (torch.bfloat16 if of_trunk else torch.float32), name
    with torch.autocast("cpu", torch.bfloat16):
        states = model.trunk(x)
        assert states.last.dtype == torch.float32
        torch.testing.assert_close(model(x), wide(x), atol=0.1, rtol=0.1)
    with pytest.raises(ValueError, match="param_dtype=bfloat16: not with trunk=rnn"):
        make(trunk="rnn", param_dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{"head_dim": 6}, {"head_dim": 24, "n_kv_heads": 1}, {
    "rope_scaling": "llama3", "rope_theta": 5e5, "rope_factor": 8.0, "rope_original_seq_len": 8}])
def test_the_fast_path_is_the_same_llama(changes, dtype):
    changes = {"head_input": "before_last", "head": "block", "n_future_heads": 2, "param_dtype": dtype} | changes
    models, results = [make(**changes), kernels.KernelTransformer(ModelArgs(**ARGS | changes))], []
    models[1].load_state_dict(models[0].state_dict())
    for model, module in zip(models, (None, kernels)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            results.append(total(Objective(model, kernels=module), tokens(), tokens(seed=2), ("ntp", "nitp_2")))
        results[-1].backward()
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.1, "atol": 0.02}
    torch.testing.assert_close(*results, **near)
    for p, q in zip(*(model.parameters() for model in models)):
        assert p.grad is q.grad is None or p.grad.dtype == q.grad.dtype == p.dtype
        torch.testing.assert_close(p.grad, q.grad, **near)


def test_heads_of_another_size_than_a_share_of_the_model():
    model, x = make(head_dim=6, n_kv_heads=2), tokens()
    assert model.layers[0].attention.wq.weight.shape == (24, 16) and model.rope_cos.shape == (12, 3)
    assert model.layers[0].attention.wo.weight.shape == (16, 24) and model(x).shape == (2, 10, 31)
    assert make().args.head_dim == 4


def test_without_a_block_there_is_nothing_to_copy():
    for changes in ({"head": "linear"}, {"head": "block", "trunk": "rnn"}):
        with pytest.raises(ValueError, match="head_init=last_block"):
            make(n_future_heads=1, **changes).start_as_last_block([1])


def test_layers_that_recur_are_the_same_model_as_their_copies():
    model, x = make(n_layers=4, recurrence=3, prelude_layers=1, coda_layers=2), tokens()
    assert [list(model.layers).index(layer) for layer in model.unrolled()] == [0, 1, 1, 1, 2, 3]
    flat = make(n_layers=6)
    flat.load_state_dict({name: w for name, w in model.state_dict().items() if not name.startswith("layers.")} | {
        f"layers.{k}.{name}": w for k, layer in enumerate(model.unrolled()) for name, w in layer.state_dict().items()})
    torch.testing.assert_close(model(x), flat(x))


def test_a_bag_is_read_as_the_mean_of_its_tokens():
    model, x = make(), tokens(2, 12)
    bags = x.unflatten(1, (-1, 3))
    torch.testing.assert_close(model.trunk(bags[:, :, :1]), model.trunk(x[:, ::3]))
    with torch.no_grad():
        mean = model.tok_embeddings.weight[bags].mean(2)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.trunk(bags)
    torch.testing.assert_close(seen[0], mean)


def test_an_elman_trunk():
    """h_t = tanh(W x_t + U h_(t-1) + b), by hand, and no position sees what comes after it."""
    model, x = make(trunk="rnn", n_layers=1), tokens()
    h, state = model.trunk(x).last, torch.zeros(2, 16)
    rnn = model.rnn
    for t in range(10):
        state = torch.tanh(model.tok_embeddings(x[:, t]) @ rnn.weight_ih_l0.T + rnn.bias_ih_l0
                           + state @ rnn.weight_hh_l0.T + rnn.bias_hh_l0)
        torch.testing.assert_close(h[:, t], state)
    assert rnn.weight_hh_l0.std() > 0.1  # not the small ones of a Transformer, which would remember nothing


def test_initial_weights():
    model = make(dim=64, n_heads=4, n_layers=8, vocab_size=512, n_future_heads=1)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
        else:
            residual = name.endswith(("wo.weight", "w2.weight"))
            assert p.std().item() == pytest.approx(0.02 / 4 if residual else 0.02, rel=0.05), name
    loss = Objective(model).evaluate(tokens(4, 12), tokens(4, 12, seed=2), all_losses(1))[0]
    assert loss["ntp"].mean.item() == pytest.approx(math.log(512), abs=0.1)


def test_every_parameter_learns_when_every_loss_weighs():
    model = make(n_future_heads=2)
    total(Objective(model), tokens(), tokens(seed=2), all_losses(2)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_future_losses_reach_the_trunk_but_not_the_ntp_heads_matrix_when_untied():
    model = make(n_future_heads=1, tie_embeddings=False)
    total(Objective(model), tokens(), tokens(seed=2), ("nitp_1",)).backward()
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
    with pytest.raises(ValueError, match="head_dim=5"):
        make(head_dim=5)
    with pytest.raises(ValueError, match="rope_scaling=llama3.*rope_original_seq_len"):
        make(rope_scaling="llama3", rope_factor=8.0)
    with pytest.raises(ValueError, match="rope_factor=8.0: needs rope_scaling"):
        make(rope_factor=8.0)
    with pytest.raises(ValueError, match="rope_scaling=yarn"):
        make(rope_scaling="yarn")
    for changes in ({"head": "linear"}, {"head": "shared"}, {"head": "block", "trunk": "rnn"}):
        with pytest.raises(ValueError, match="head_input=before_last"):
            make(head_input="before_last", **changes)
    with pytest.raises(ValueError, match="head=deep"):
        make(head="deep")
    with pytest.raises(ValueError, match="trunk=tree"):
        make(trunk="tree")
    with pytest.raises(ValueError, match="recurrence=2.*prelude_layers=1"):
        make(recurrence=2)
    with pytest.raises(ValueError, match="max_seq_len is 12"):
        make()(tokens(T=13))
