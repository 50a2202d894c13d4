"""One training step: what its micro-batches add up to, and what changes between steps."""

import pytest
import torch

import train
from losses import loss_weights
from settings import Settings
from step import kernels
from step.machine import Machine
from text.tokenizer import BOS
from train import build, training_step

TINY = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 16, "vocab_size": 64, "device": "cpu",
        "dtype": "float32", "max_iters": 10, "warmup_iters": 0, "grad_clip": 0.0}
HEADS = {"n_future_heads": 2, "nitp_weight": 0.3, "consistency_weight": 0.1, "mask_document_ends": True}


def new_run(**changes) -> train.Training:
    return build(Settings(**TINY | changes), Machine(torch.device("cpu")))


def rows(B: int, T: int = 16, bos_rows: int = 0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens; in the first `bos_rows` rows nearly every token starts a document."""
    x = torch.randint(3, 64, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    x[:bos_rows, 2:] = BOS
    return x[:, :-1], x[:, 1:]


def gradients(run: train.Training, micro_batches, monkeypatch) -> tuple[dict, dict]:
    """({loss: mean}, {parameter: its gradient}) of one step, taken just before the update."""
    seen = {}
    monkeypatch.setattr(run.optimizer, "step", lambda *_: seen.update(
        {name: p.grad.clone() for name, p in run.model.named_parameters()}))
    return training_step(run, 0, loss_weights(run.s, 0.0), micro_batches).means, seen


@pytest.mark.parametrize("path", ["plain", "fast"])
def test_accumulation_is_a_mean_over_all_positions_not_of_micro_means(path, monkeypatch):
    x, y = rows(6, bos_rows=2)
    whole, parts = (new_run(**HEADS, path=path) for _ in range(2))
    one = gradients(whole, [(x, y)], monkeypatch)
    many = gradients(parts, [(x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:], y[3:])], monkeypatch)
    targets = [whole.objective.targets(part, ("nitp_2",))["nitp_2"].valid.sum().item() for part in (y[:2], y[3:])]
    assert targets[0] * 10 < targets[1]  # very unequal numbers of targets
    for name, mean in one[0].items():
        assert many[0][name].item() == pytest.approx(mean.item(), rel=1e-6), name
    for name, gradient in one[1].items():
        torch.testing.assert_close(many[1][name], gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item())


@pytest.mark.parametrize("path", ["plain", "fast"])
def test_accumulation_samples_rows_of_each_micro_batch(path, monkeypatch):
    """The first row of each of two micro-batches is a sample of two; the counts, unequal, are of the sample."""
    x, y = rows(4, bos_rows=2)
    parts = new_run(**HEADS, path=path, aux_positions=0.5, batch_size=2)
    whole = new_run(**HEADS, path=path, aux_positions=0.5, batch_size=4)
    many = gradients(parts, [(x[:2], y[:2]), (x[2:], y[2:])], monkeypatch)
    assert many[0]["nitp_1"] != gradients(new_run(**HEADS, path=path), [(x, y)], monkeypatch)[0]["nitp_1"]
    order = [0, 2, 1, 3]
    one = gradients(whole, [(x[order], y[order])], monkeypatch)
    for name, mean in one[0].items():
        assert many[0][name].item() == pytest.approx(mean.item(), rel=1e-6), name
    for name, gradient in one[1].items():
        torch.testing.assert_close(many[1][name], gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item())


def test_evaluation_is_of_all_positions():
    x, y = rows(4)
    found = [new_run(**HEADS, aux_positions=share, batch_size=4).objective.evaluate(x, y, ("ntp", "nitp_2"), 2)[0]
             for share in (1.0, 0.25)]
    assert found[0] == found[1] and found[0]["nitp_2"].count == found[0]["acc_2"].count > 32


def test_a_grad_clip_of_0_is_off(monkeypatch):
    off, high = (gradients(new_run(grad_clip=clip), [rows(4)], monkeypatch)[1] for clip in (0.0, 1e9))
    assert all(torch.equal(off[name], high[name]) and off[name].abs().sum() > 0 for name in off)


def test_each_chunk_reaches_the_weights_in_bfloat16(monkeypatch):
    """kernels.c rounds weights to the products' type; the gradient of every chunk still adds to the float32 weight."""
    x, y = rows(8)
    found = []
    for chunk in (1 << 20, 16):  # all rows at once; 8 chunks
        monkeypatch.setattr("losses.chunk_rows", lambda *_, chunk=chunk: chunk)
        run = new_run(**HEADS | {"dtype": "bfloat16", "path": "fast", "tie_embeddings": False})
        assert run.objective.kernels is kernels
        found.append(gradients(run, [(x, y)], monkeypatch)[1])
    for name in ("output.weight", "future_heads.0.weight", "future_heads.1.weight"):
        whole, chunked = (gradient[name] for gradient in found)
        assert whole.dtype == torch.float32
        assert (chunked - whole).norm() < 0.01 * whole.norm(), name


def test_the_optimizer_keeps_its_state_when_the_trunk_joins():
    run = new_run(**HEADS | {"freeze_trunk_iters": 3, "path": "plain"})
    head, trunk = run.model.future_heads[0].weight, run.model.layers[0].attention.wq.weight
    for it in range(3):
        training_step(run, it, loss_weights(run.s, it / 10), [rows(4, seed=it)])
    before = run.optimizer.state[head]["exp_avg"].clone()
    assert before.abs().sum() > 0 and trunk not in run.optimizer.state
    training_step(run, 3, loss_weights(run.s, 0.3), [rows(4, seed=3)])
    after = run.optimizer.state[head]
    assert after["step"].item() == 4 and run.optimizer.state[trunk]["step"].item() == 1
    assert (after["exp_avg"] - 0.9 * before).abs().max() < before.abs().max()  # went on from what it was
    assert not torch.equal(after["exp_avg"], before)


def test_rows_of_superposition_are_as_many_bags_long(data_dir):
    words = {"data_dir": str(data_dir), "dataset": "toy", "vocab_size": 512, "eval_iters": 1, "batch_size": 4}
    s = Settings(**TINY | words | {"superposition": 4})
    data = train.load_data(s, Machine(torch.device("cpu")))
    (x, y), (bag_x, bag_y) = data.batches[0], data.bags[0]
    assert x.shape == y.shape == (4, 16) and bag_x.shape == bag_y.shape == (4, 64)
    run = build(s, Machine(torch.device("cpu")), data.texts)
    means = training_step(run, 0, {"superposition": 1.0}, [(bag_x, bag_y)]).means
    target = run.objective.targets(bag_y, ("superposition",))["superposition"]
    assert target.valid.shape == (4, 16) and target.valid.sum() == 4 * 15  # 16 bags a row; none follows the last
    assert means["superposition"] > 0


def test_the_table_of_soft_targets_is_refreshed_on_time(words, monkeypatch):
    refreshed = []
    refresh = train.Objective.refresh_neighbours

    def count(self):
        refreshed.append(self.model.tok_embeddings.weight.detach().clone())
        refresh(self)

    monkeypatch.setattr(train.Objective, "refresh_neighbours", count)
    assert train.main(words(soft_weight=0.2, soft_neighbours=4, soft_refresh=3)) == 0
    assert len(refreshed) == 4  # when it is built, and before steps 0, 3 and 6 of 8
    assert torch.equal(refreshed[0], refreshed[1]) and not torch.equal(refreshed[1], refreshed[2])
