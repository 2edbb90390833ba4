"""make_views as a whole: against torchvision image by image, and as a function of image, seed and position."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from ssl_diversity.views import MEAN, STD, ViewSpec, augment
from ssl_diversity.views.augment import make_views, normalise
from ssl_diversity.views.sampling import sample

JITTER = {"jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
BYOL = [
    ViewSpec(crop_scale=(0.08, 1), flip=0.5, **JITTER, grayscale=0.2, blur=1.0),
    ViewSpec(crop_scale=(0.08, 1), flip=0.5, **JITTER, grayscale=0.2, blur=0.1, solarize=0.2),
]
MULTI_CROP = [BYOL[0], ViewSpec(size=0.5, count=4, crop_scale=(0.05, 0.25), flip=0.5, **JITTER, blur=0.5)]
RECIPES = pytest.mark.parametrize("specs", [BYOL, MULTI_CROP, [ViewSpec()]], ids=["byol", "crops", "plain"])


def batch(n: int, side: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 10**9, (n,), generator=generator)


def slow_view(image: Tensor, spec: ViewSpec, seed: int, view: int, position: int) -> Tensor:
    """One image, one operation after the other, by torchvision."""
    p = sample(spec, seed, [view], torch.tensor([position]), tuple(image.shape[1:]))
    size = spec.pixels(image.shape[1])
    x = reference.resized_crop(image / 255, *p.boxes[0].tolist(), size=[size, size], antialias=True)
    x = reference.horizontal_flip(x) if p.flip else x
    blends = [reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation]
    for slot in range(4):
        x = reference.adjust_hue(x.clamp(0, 1), p.hue.item()) if p.hue_slot == slot else x
        if slot < 3:
            x = blends[p.kinds[0, slot]](x, p.factors[0, slot].item())
    x = reference.rgb_to_grayscale(x, 3) if p.grayscale else x
    kernel = [2 * spec.blur_radius(size) + 1] * 2
    x = reference.gaussian_blur(x, kernel, [p.sigma.item()]) if p.blur else x
    x = reference.solarize(x, spec.solarize_threshold) if p.solarize else x
    return reference.normalize(x, MEAN, STD)


@RECIPES
def test_views_are_those_of_torchvision(specs: list[ViewSpec]) -> None:
    images, positions = batch(60)
    expanded = [spec for spec in specs for _ in range(spec.count)]
    views = make_views(images, specs, 7, positions)
    assert len(views) == len(expanded)
    for number, (view, spec) in enumerate(zip(views, expanded, strict=True)):
        rows = zip(images, positions.tolist(), strict=True)
        slow = torch.stack([slow_view(image, spec, 7, number, position) for image, position in rows])
        close = (view - slow).abs() < 1e-4
        # Solarise jumps at its threshold: a value on the edge may fall on either side.
        assert close.float().mean() > (0.999 if spec.solarize else 0.9999999)


@RECIPES
@pytest.mark.parametrize("side", [8, 15, 16, 33])
def test_a_view_does_not_depend_on_the_rest_of_the_batch(specs: list[ViewSpec], side: int) -> None:
    """Bit for bit, on a CPU: alone, in any part of the batch, in any order, in chunks."""
    images, positions = batch(97, side)
    whole = make_views(images, specs, 3, positions)
    order = torch.randperm(97, generator=torch.Generator().manual_seed(0))
    for size in (1, 2, 31, 64, 97):
        parts = [make_views(images[rows], specs, 3, positions[rows]) for rows in order.split(size)]
        for view, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(pieces), view[order])


def test_a_large_batch_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images, positions = batch(50)
    whole = make_views(images, BYOL, 3, positions)
    monkeypatch.setattr(augment, "_CHUNK_VALUES", 6000)
    for a, b in zip(whole, make_views(images, BYOL, 3, positions), strict=True):
        assert torch.equal(a, b)


def test_the_gpu_way_to_choose_images_gives_the_same_views(monkeypatch: pytest.MonkeyPatch) -> None:
    images, positions = batch(50)
    on_cpu = make_views(images, BYOL, 3, positions)
    monkeypatch.setattr(augment, "_on_cpu", lambda images: False)
    for a, b in zip(on_cpu, make_views(images, BYOL, 3, positions), strict=True):
        assert torch.equal(a, b)


@RECIPES
def test_a_gpu_never_has_to_be_waited_for(specs: list[ViewSpec]) -> None:
    """Meta tensors have no values: code that needed one on the host would raise."""
    images, positions = (x.to("meta") for x in batch(8))
    for view in make_views(images, specs, 3, positions):
        assert view.device.type == "meta"


def test_seed_position_and_index_change_the_view_and_nothing_else_does() -> None:
    images, positions = batch(20)
    spec = BYOL[0]
    first, second = make_views(images, [spec, spec], 3, positions)
    assert not torch.equal(first, second)
    assert not torch.equal(first, make_views(images, [spec], 4, positions)[0])
    assert not torch.equal(first, make_views(images, [spec], 3, positions + 1)[0])
    state = torch.random.get_rng_state()
    torch.rand(3)
    assert torch.equal(first, make_views(images, [spec], 3, positions)[0])
    torch.random.set_rng_state(state)
    make_views(images, [spec], 3, positions)
    assert torch.equal(state, torch.random.get_rng_state())
    # A view does not depend on the specs of the others, nor on the operations it does not use.
    assert torch.equal(second, make_views(images, [ViewSpec(), spec], 3, positions)[1])
    twice = make_views(images, [spec.model_copy(update={"count": 2})], 3, positions)
    assert torch.equal(torch.cat(twice), torch.cat((first, second)))
    plain = ViewSpec(crop_scale=spec.crop_scale, flip=0.5)
    assert torch.equal(
        make_views(images, [plain], 3, positions)[0],
        make_views(images, [plain.model_copy(update={"blur": 1e-9})], 3, positions)[0],
    )


def test_a_plain_view_is_the_normalised_image() -> None:
    images, positions = batch(20)
    (view,) = make_views(images, [ViewSpec(crop_ratio=(1.0, 1.0))], 0, positions)
    torch.testing.assert_close(view, normalise(images), rtol=0, atol=1e-5)
    expected = reference.normalize(images / 255, MEAN, STD)
    torch.testing.assert_close(normalise(images), expected, rtol=0, atol=1e-5)


def test_precision_and_gradients_are_the_callers_no_concern() -> None:
    images, positions = batch(20)
    expected = make_views(images, BYOL, 3, positions)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = make_views(images, BYOL, 3, positions)
    with torch.inference_mode():
        under_inference = make_views(images, BYOL, 3, positions)
    for a, b, c in zip(expected, under_autocast, under_inference, strict=True):
        assert a.dtype == torch.float32
        assert not a.requires_grad
        assert a.is_contiguous()
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_images_are_left_alone() -> None:
    images, positions = batch(20)
    before = images.clone()
    make_views(images, BYOL, 3, positions)
    assert torch.equal(images, before)
