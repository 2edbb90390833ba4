import subprocess
import sys

import pytest

from ssl_diversity.config import validate
from ssl_diversity.errors import UserError
from ssl_diversity.views import ViewSpec


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", 3),
        ("size", 1.5),
        ("size", 0.0),
        ("size", float("nan")),
        ("size", "large"),
        ("count", 0),
        ("crop_scale", [0.0, 1.0]),
        ("crop_scale", [0.9, 0.2]),
        ("crop_scale", [0.2, 1.4]),
        ("crop_ratio", [0.75]),
        ("flip", 1.1),
        ("jitter", -0.1),
        ("brightness", -1),
        ("hue", 0.6),
        ("blur", 2),
        ("blur_sigma", [2.0, 0.1]),
        ("blur_kernel", 0),
        ("solarize_threshold", 128),
        ("solarise", 0.1),
    ],
)
def test_a_wrong_value_is_one_line_that_names_file_and_key(key: str, value: object) -> None:
    with pytest.raises(UserError) as error:
        validate(ViewSpec, {key: value}, "simclr.yaml")
    assert "simclr.yaml" in str(error.value)
    assert key in str(error.value)
    assert "\n" not in str(error.value)


def test_size_is_pixels_or_a_fraction() -> None:
    assert ViewSpec(size=0.5).pixels(32) == 16
    assert ViewSpec(size=96).pixels(224) == 96
    assert ViewSpec().pixels(20) == 20


def test_blur_radius_reaches_three_sigma_or_half_the_kernel_and_stays_inside_the_view() -> None:
    assert ViewSpec(blur_sigma=(0.1, 2.0)).blur_radius(32) == 6
    assert ViewSpec(blur_sigma=(0.1, 2.0)).blur_radius(4) == 3
    assert ViewSpec(blur_kernel=0.1).blur_radius(224) == 11  # SimCLR's 23 pixels


def test_a_spec_survives_json_and_keeps_integer_and_fraction_apart() -> None:
    for spec in (ViewSpec(size=16, blur=0.5), ViewSpec(size=1.0, crop_scale=(0.08, 1.0))):
        again = ViewSpec.model_validate_json(spec.model_dump_json())
        assert again == spec
        assert type(again.size) is type(spec.size)


def test_specs_need_no_torch() -> None:
    code = "import sys, ssl_diversity.views; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
