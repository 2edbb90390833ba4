"""Training steps: what moves, what does not, what a state dict holds, and what is evaluated."""

import copy
import io
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from method_helpers import batches, step, tiny, train
from torch import Tensor

from ssl_diversity import methods
from ssl_diversity.backbones import BACKBONES, build_backbone
from ssl_diversity.methods.base import Method
from ssl_diversity.methods.recipe import METHODS, load_recipe

TEACHERS = ["byol", "dino", "mocov3"]


def _suitable(method: str) -> list[str]:
    return [name for name, vit in BACKBONES.items() if vit or not METHODS[method]]


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], Tensor))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_moves_every_trainable_parameter_and_its_loss_is_finite(method: str) -> None:
    module = tiny(method, overrides={"freeze_fraction": 0.0} if method == "dino" else {})
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    train(module, steps=2)
    assert torch.isfinite(module.last_loss)
    assert module.last_loss.shape == ()
    assert not module.last_loss.requires_grad
    still = [name for name, p in module.named_parameters() if name in before and torch.equal(p, before[name])]
    assert still == []
    assert module.samples_seen == 2 * 16


@pytest.mark.parametrize("method", TEACHERS)
def test_a_teacher_has_no_gradient_and_is_the_average_of_its_student(method: str) -> None:
    module = tiny(method)
    optimizer = module.configure_optimizers()
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    expected = [(s, copy.deepcopy(list(t.parameters()))) for s, t in module.followers]
    for student, teacher in module.followers:
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    for batch in batches(2):
        rate = module.ema_rate()
        step(module, optimizer, batch)
        for student, averages in expected:
            for average, p in zip(averages, student.parameters(), strict=True):
                average.data.mul_(rate).add_(p.data, alpha=1 - rate)
    for (_, averages), (_, teacher) in zip(expected, module.followers, strict=True):
        for average, p in zip(averages, teacher.parameters(), strict=True):
            assert id(p) not in optimized
            assert p.grad is None
            torch.testing.assert_close(p.data, average.data)


LARS = {"optimizer": "lars", "betas": None, "momentum": 0.9, "lars_eta": 0.02, "lars_clip": True}
SGD = {"optimizer": "sgd", "betas": None, "momentum": 0.9}


@pytest.mark.parametrize(
    ("method", "overrides"),
    [*((method, {}) for method in METHODS), ("byol", LARS), ("dino", LARS), ("simclr", SGD)],
)
def test_a_resumed_run_is_the_run_that_never_stopped(method: str, overrides: dict[str, Any]) -> None:
    straight = tiny(method, overrides=overrides)
    train(straight, steps=4)

    first = tiny(method, overrides=overrides)
    optimizer = first.configure_optimizers()
    for batch in batches(4)[:2]:
        step(first, optimizer, batch)
    saved = io.BytesIO()
    torch.save((first.state_dict(), optimizer.state_dict()), saved)
    saved.seek(0)
    module_state, optimizer_state = torch.load(saved, weights_only=True)
    resumed = tiny(method, overrides=overrides, seed=9)  # other weights, all of them replaced
    resumed.seed = first.seed
    resumed.load_state_dict(module_state)
    optimizer = resumed.configure_optimizers()
    optimizer.load_state_dict(optimizer_state)
    torch.manual_seed(77)
    for batch in batches(4)[2:]:
        step(resumed, optimizer, batch)
    assert torch.isfinite(straight.last_loss)
    assert _equal(straight.state_dict(), resumed.state_dict())
    assert torch.equal(straight.last_loss, resumed.last_loss)


@pytest.mark.parametrize("method", METHODS)
def test_neither_building_nor_training_touches_the_global_generator(method: str) -> None:
    overrides = {"drop_path": 0.2}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a = tiny(method, backbone="vit-micro", overrides=overrides)
    train(a, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    b = tiny(method, backbone="vit-micro", overrides=overrides)
    train(b, steps=2)
    assert _equal(a.state_dict(), b.state_dict())


@pytest.mark.parametrize(
    ("method", "sizes"), [("simclr", [32]), ("byol", [32]), ("dino", [32, 64]), ("mae", [])]
)
def test_views_of_one_size_are_one_stacked_forward(method: str, sizes: list[int]) -> None:
    module = tiny(method)
    seen: list[int] = []
    module.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    module.training_step(batches(1)[0])
    assert seen == sizes


@pytest.mark.parametrize("method", METHODS)
def test_the_evaluated_network_loads_strictly_and_computes_the_same(method: str) -> None:
    backbones = ["vit-micro"] if METHODS[method] else ["vit-micro", "conv-tiny", "resnet18"]
    for name in backbones:
        module = tiny(method, backbone=name, overrides={"drop_path": 0.2})
        train(module, steps=1)
        pooling, state = module.evaluation_state()
        assert pooling == ("tokens" if method == "mae" else "cls" if BACKBONES[name] else "pool")
        network = build_backbone(name, 16).eval()
        network.load_state_dict(state, strict=True)
        images = torch.randn(2, 3, 16, 16)
        module.eval()
        torch.testing.assert_close(network(images), module.evaluated(images))
        if method == "dino":
            assert not torch.equal(network(images), module.backbone(images))


@pytest.mark.parametrize("method", METHODS)
def test_every_suitable_backbone_can_be_evaluated(method: str) -> None:
    for name in _suitable(method):
        with torch.device("meta"):
            recipe = load_recipe(method, "small", budget_samples=1, image_size=32)
            module = methods.build(
                method, backbone=name, image_size=32, recipe=recipe, budget=64, batch_size=8, seed=0
            )
            _, state = module.evaluation_state()
            build_backbone(name, 32).load_state_dict(state, strict=True)


def test_the_seed_decides_the_initial_weights() -> None:
    assert _equal(tiny("byol").state_dict(), tiny("byol").state_dict())
    assert not _equal(tiny("byol").state_dict(), tiny("byol", seed=1).state_dict())


def test_the_learning_rate_is_scaled_by_the_batch_size_once_and_biases_and_norms_do_not_decay() -> None:
    module = tiny(
        "simclr", overrides={"lr": 0.256, "warmup_fraction": 0.0, "weight_decay": 0.3}, budget=10**6
    )
    optimizer = module.configure_optimizers()
    step(module, optimizer, batches(1)[0])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.016, 0.016])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0]
    assert all(p.ndim > 1 for p in optimizer.param_groups[0]["params"])
    assert all(p.ndim == 1 for p in optimizer.param_groups[1]["params"])


class _Loader(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return batches(3)[index]


@pytest.mark.parametrize("method", ["dino", "mae"])
def test_lightning_s_trainer_takes_the_same_steps(method: str) -> None:
    by_hand: Method = tiny(method, overrides={"clip_norm": 0.1}, budget=48)
    train(by_hand, steps=3)
    by_trainer = tiny(method, overrides={"clip_norm": 0.1}, budget=48)
    trainer = pl.Trainer(max_steps=3, accelerator="cpu", barebones=True)
    trainer.fit(by_trainer, torch.utils.data.DataLoader(_Loader(), batch_size=None))
    assert by_trainer.samples_seen == 16 * trainer.global_step == 48
    assert _equal(by_hand.state_dict(), by_trainer.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_autocast_trains_and_leaves_the_loss_in_float32(method: str) -> None:
    module = tiny(method)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.training_step(batches(1)[0])
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
