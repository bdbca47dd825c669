import torch
from torch import nn

import rankfold
from rankfold import LTSFT
from tests.methods.support import attached, close, draw, linear, perturb


def test_count_is_a_percent_of_each_weight():
    adapter = rankfold.attach(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 9)), LTSFT(), targets=["0", "1"])
    assert [delta.phi.numel() for delta in adapter.deltas.values()] == [12, 2]


def test_the_mask_is_random_where_no_lottery_is_held():
    a, b = (attached(linear(draw(30, 40)), LTSFT(density=0.1), seed=seed)[1] for seed in (0, 1))
    overlap = torch.isin(a.indices, b.indices).sum()
    assert 0 < int(overlap) < 40  # 12 are expected


def test_language_and_task_compose_in_any_order_and_come_apart():
    W = draw(30, 40)
    model = nn.Sequential(linear(W))
    for name in ("language", "task"):
        adapter = rankfold.attach(model, LTSFT(density=0.2), targets=["0"], name=name, seed=len(name))
        perturb(adapter.deltas["0"], seed=len(name))
    phi = {name: adapter.deltas["0"].update().detach() for name, adapter in rankfold.adapters(model).items()}
    rankfold.merge(model, "language")
    rankfold.merge(model, "task")
    one = model[0].weight.clone()
    close(one, W + phi["language"] + phi["task"])
    rankfold.unmerge(model)
    assert torch.equal(model[0].weight, W)
    rankfold.merge(model, "task")
    rankfold.merge(model, "language")
    close(model[0].weight, one)
    rankfold.unmerge(model, "language")  # zero-shot: another language's difference takes its place
    close(model[0].weight, W + phi["task"])


def test_a_task_learned_on_a_merged_language_holds_the_task_alone():
    W, x = draw(6, 5), draw(4, 5)
    model = nn.Sequential(linear(W))
    language = rankfold.attach(model, LTSFT(density=0.2), targets=["0"], name="language").deltas["0"]
    perturb(language)
    rankfold.merge(model, "language")
    task = rankfold.attach(model, LTSFT(density=0.2), targets=["0"], name="task", seed=1).deltas["0"]
    close(model(x), x @ (W + language.update()).T)
    perturb(task)
    close(model(x), x @ (W + language.update() + task.update()).T)
    rankfold.unmerge(model)
    close(model(x), x @ (W + task.update()).T)


def test_training_moves_nothing_off_the_mask():
    model, delta = attached(linear(draw(30, 40), draw(30)), LTSFT())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "deltas" not in name}
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(5):
        model(draw(4, 40, seed=step)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    off = torch.ones(1200, dtype=torch.bool)
    off[delta.indices.long()] = False
    W = model[0].weight.clone()
    rankfold.merge(model)
    assert torch.equal(model[0].weight.flatten()[off], W.flatten()[off])
    assert not (model[0].weight.flatten()[~off] == W.flatten()[~off]).any()
