"""Every operation against torchvision's, image by image, at the same parameters."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from ssl_diversity.views import operations
from ssl_diversity.views.operations import BRIGHTNESS, CONTRAST, SATURATION

BATCH = 24


def images(height: int, width: int) -> Tensor:
    """Noise, a grey image, a black, a white, a primary, and an image of few values with many ties."""
    generator = torch.Generator().manual_seed(height * width)
    x = torch.rand(BATCH, 3, height, width, generator=generator)
    x[0] = x[0, :1]
    x[1], x[2] = 0, 1
    x[3] = torch.tensor([1.0, 0, 0])[:, None, None]
    x[4] = (x[4] * 3).round() / 3
    return x


def numbers(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, BATCH)


def assert_close(ours: Tensor, theirs: list[Tensor], tolerance: float) -> None:
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(16, 16, 16), (32, 32, 32), (32, 32, 9), (13, 21, 17), (40, 24, 8)]
)
def test_resized_crop(height: int, width: int, size: int) -> None:
    x = images(height, width)
    generator = torch.Generator().manual_seed(1)
    boxes = []
    for _ in range(BATCH - 2):
        h = int(torch.randint(1, height + 1, (), generator=generator))
        w = int(torch.randint(1, width + 1, (), generator=generator))
        top = int(torch.randint(0, height - h + 1, (), generator=generator))
        left = int(torch.randint(0, width - w + 1, (), generator=generator))
        boxes.append([top, left, h, w])
    boxes += [[0, 0, height, width], [height - 1, width - 1, 1, 1]]
    flip = torch.arange(BATCH) % 2 == 0
    ours = operations.resized_crop(x, torch.tensor(boxes), size, flip)
    theirs = [
        reference.resized_crop(image, *box, size=[size, size], antialias=True)
        for image, box in zip(x, boxes, strict=True)
    ]
    theirs = [reference.horizontal_flip(t) if f else t for t, f in zip(theirs, flip, strict=True)]
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    ("kind", "adjust"),
    [
        (BRIGHTNESS, reference.adjust_brightness),
        (CONTRAST, reference.adjust_contrast),
        (SATURATION, reference.adjust_saturation),
    ],
)
def test_blend(kind, adjust) -> None:
    x, factor = images(12, 17), numbers(0, 2)
    ours = operations.blend(x, torch.full((BATCH,), kind), factor)
    assert_close(ours, [adjust(i, float(f)) for i, f in zip(x, factor, strict=True)], 1e-6)


def test_blend_takes_another_kind_for_each_image() -> None:
    x, factor, kind = images(8, 8), numbers(0, 2), torch.arange(BATCH) % 3
    mixed = operations.blend(x, kind, factor)
    for k in (BRIGHTNESS, CONTRAST, SATURATION):
        alone = operations.blend(x, torch.full((BATCH,), k), factor)
        assert torch.equal(mixed[kind == k], alone[kind == k])


def test_blend_by_one_changes_nothing() -> None:
    x = images(8, 8)
    assert torch.equal(operations.blend(x, torch.arange(BATCH) % 3, torch.ones(BATCH)), x)


def test_adjust_hue() -> None:
    x, shift = images(12, 17), numbers(-0.5, 0.5)
    ours = operations.adjust_hue(x, shift)
    assert_close(ours, [reference.adjust_hue(i, float(s)) for i, s in zip(x, shift, strict=True)], 1e-5)


def test_adjust_hue_on_every_kind_of_colour() -> None:
    """All colours of a 9 x 9 x 9 grid: every sector of the circle, its edges, and greys."""
    grid = torch.linspace(0, 1, 9)
    colours = torch.cartesian_prod(grid, grid, grid).T.reshape(3, 27, 27)
    for shift in (-0.5, -1 / 3, -0.1, 0.0, 1 / 6, 0.25, 0.5):
        ours = operations.adjust_hue(colours[None], torch.tensor([shift]))
        assert_close(ours, [reference.adjust_hue(colours, shift)], 1e-5)


def test_grayscale() -> None:
    x = images(12, 17)
    assert_close(operations.grayscale(x), list(reference.rgb_to_grayscale(x, num_output_channels=3)), 1e-6)


@pytest.mark.parametrize(("height", "width", "radius"), [(16, 16, 6), (32, 32, 1), (7, 12, 6), (4, 4, 3)])
def test_gaussian_blur(height: int, width: int, radius: int) -> None:
    x, sigma = images(height, width), numbers(0.1, 2.5)
    kernel = [2 * radius + 1, 2 * radius + 1]
    ours = operations.gaussian_blur(x, sigma, radius)
    theirs = [reference.gaussian_blur(i, kernel, [float(s)]) for i, s in zip(x, sigma, strict=True)]
    assert_close(ours, theirs, 1e-5)


def test_solarize() -> None:
    x = images(12, 17)
    assert_close(operations.solarize(x, 0.5), [reference.solarize(i, 0.5) for i in x], 0)
