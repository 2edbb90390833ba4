"""The distributions of a view's parameters, against torchvision's own sampling where it has one."""

from itertools import permutations

import pytest
import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from ssl_diversity.views import ViewSpec
from ssl_diversity.views.sampling import Parameters, crop_boxes, sample

N = 20_000


def draw(spec: ViewSpec, n: int = N, side: tuple[int, int] = (32, 32)) -> Parameters:
    return sample(spec, 0, [0], torch.arange(n), side)


def ks(a: Tensor, b: Tensor) -> float:
    """Kolmogorov-Smirnov distance of two samples of small integers."""
    top = int(max(a.max(), b.max())) + 1
    cdf = [torch.bincount(x, minlength=top).cumsum(0) / len(x) for x in (a, b)]
    return float((cdf[0] - cdf[1]).abs().max())


@pytest.mark.parametrize(
    ("side", "scale", "ratio"),
    [
        ((32, 32), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((32, 32), (0.9, 1.0), (0.5, 2.0)),  # ten tries often fail
        ((20, 48), (0.2, 1.0), (3 / 4, 4 / 3)),
    ],
)
def test_boxes_are_distributed_as_random_resized_crop(
    side: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    ours = draw(ViewSpec(crop_scale=scale, crop_ratio=ratio), 6000, side).boxes
    torch.manual_seed(0)
    image = torch.empty(3, *side)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(6000)])
    for column in range(4):
        assert ks(ours[:, column], theirs[:, column]) < 0.035  # two samples of 6000: 1 % beyond 0.030


def test_boxes_lie_inside_and_reach_every_place() -> None:
    top, left, height, width = draw(ViewSpec(crop_scale=(0.2, 1.0))).boxes.unbind(1)
    assert ((top >= 0) & (left >= 0) & (height > 0) & (width > 0)).all()
    assert ((top + height <= 32) & (left + width <= 32)).all()
    assert (top == 0).any()
    assert (top + height == 32).any()
    assert (left + width == 32).any()


@pytest.mark.parametrize(
    ("side", "ratio", "box"),
    [
        ((32, 32), (3.0, 4.0), [10, 0, 11, 32]),
        ((32, 32), (0.25, 0.3), [0, 11, 32, 10]),
        ((10, 40), (0.75, 4 / 3), [0, 13, 10, 13]),
    ],
)
def test_where_no_try_fits_the_crop_is_central(
    side: tuple[int, int], ratio: tuple[float, float], box: list[int]
) -> None:
    u = torch.full((2, 10), 0.5)
    spec = ViewSpec(crop_scale=(1.0, 1.0), crop_ratio=ratio)
    assert crop_boxes(spec, u, u, torch.rand(2, 2), side).tolist() == [box, box]


def test_the_first_try_that_fits_is_taken() -> None:
    spec = ViewSpec(crop_scale=(0.5, 1.0), crop_ratio=(0.5, 2.0))
    area, ratio = torch.full((1, 10), 0.99), torch.zeros(1, 10)  # nearly all of it, twice as high as wide
    area[0, 3], ratio[0, 3] = 0.0, 0.5  # half of it, square
    area[0, 5], ratio[0, 5] = 0.2, 0.5
    assert crop_boxes(spec, area, ratio, torch.zeros(1, 2), (32, 32)).tolist() == [[0, 0, 23, 23]]


def test_jitter_takes_each_of_the_24_orders_equally_often() -> None:
    spec = ViewSpec(jitter=1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    p = draw(spec)
    orders = []
    for kinds, slot in zip(p.kinds.tolist(), p.hue_slot.tolist(), strict=True):
        orders.append((*kinds[:slot], 3, *kinds[slot:]))
    counts = torch.tensor([orders.count(order) for order in permutations(range(4))])
    assert counts.sum() == N
    assert ((counts - N / 24) ** 2 / (N / 24)).sum() < 50  # chi-square, 23 degrees: 0.1 % beyond 49.7


def test_factors_have_their_ranges() -> None:
    spec = ViewSpec(jitter=1, brightness=0.4, contrast=1.5, saturation=0.8, hue=0.2)
    p = draw(spec)
    for kind, (low, high) in enumerate([(0.6, 1.4), (0.0, 2.5), (0.2, 1.8)]):
        factor = p.factors[p.kinds == kind]
        assert len(factor) == N
        assert_uniform(factor, low, high)
    assert_uniform(p.hue, -0.2, 0.2)
    assert_uniform(draw(ViewSpec(blur=1, blur_sigma=(0.1, 2.0))).sigma, 0.1, 2.0)


def assert_uniform(values: Tensor, low: float, high: float) -> None:
    u = ((values - low) / (high - low)).sort().values
    assert u[0] >= -1e-6
    assert u[-1] <= 1 + 1e-6
    assert (u - torch.linspace(0, 1, len(u))).abs().max() < 0.014  # Kolmogorov-Smirnov, 0.1 % beyond


def test_probabilities() -> None:
    spec = ViewSpec(flip=0.5, jitter=0.8, hue=0.1, grayscale=0.2, blur=0.1, solarize=0.3)
    p = draw(spec)
    happens = (p.flip, p.hue_slot >= 0, p.grayscale, p.blur, p.solarize)
    for happened, probability in zip(happens, (0.5, 0.8, 0.2, 0.1, 0.3), strict=True):
        assert abs(float(happened.float().mean()) - probability) < 0.012
    together = torch.stack([h.float() for h in happens])
    assert (torch.corrcoef(together) - torch.eye(5)).abs().max() < 0.03
    assert (p.factors[p.hue_slot < 0] == 1).all()


def test_never_and_always() -> None:
    never, always = draw(ViewSpec()), draw(ViewSpec(flip=1, jitter=1, grayscale=1, blur=1, solarize=1))
    for name in ("flip", "grayscale", "blur", "solarize"):
        assert not getattr(never, name).any()
        assert getattr(always, name).all()
    assert (never.hue_slot == -1).all()
    assert (always.hue_slot >= 0).all()


def test_views_of_one_position_are_independent() -> None:
    spec = ViewSpec(crop_scale=(0.08, 1.0))
    a, b = (sample(spec, 0, [view], torch.arange(N), (32, 32)).boxes.float().T for view in (0, 1))
    assert torch.corrcoef(torch.cat((a, b)))[:4, 4:].abs().max() < 0.03
