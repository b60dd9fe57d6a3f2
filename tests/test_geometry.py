"""Sizes that follow from the image size, and errors that suggest sizes that fit."""

import pytest

from src.core.errors import UserError
from src.core.geometry import Geometry


@pytest.mark.parametrize(
    ("image", "decoder_patch", "encoder_patch", "grid", "encoder_input"),
    [
        (128, 16, 14, 8, 112),
        (224, 16, 14, 14, 196),
        (256, 16, 14, 16, 224),
        (512, 16, 14, 32, 448),
        (378, 14, 14, 27, 378),
        (256, 16, 16, 16, 256),
    ],
)
def test_sizes_follow_from_the_image(image, decoder_patch, encoder_patch, grid, encoder_input):
    geometry = Geometry.of(image, decoder_patch, encoder_patch)
    assert (geometry.grid, geometry.encoder_input_size, geometry.tokens) == (grid, encoder_input, grid * grid)
    assert Geometry.of(image, decoder_patch, encoder_patch, encoder_input, grid * grid) == geometry


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((250, 16, 14), ["250", "240", "256"]),
        ((378, 16, 14), ["378", "368", "384", "14", "18"]),
        ((256, 16, 14, 256), ["encoder_input_size=256", "224", "16 x 16"]),
        ((378, 14, 14, None, 256), ["num_tokens=256", "729", "data.image_size=224"]),
        ((256, 16, 14, None, 250), ["not a square"]),
        ((0, 16, 14), ["data.image_size=0"]),
        ((256, -16, 14), ["decoder_patch_size=-16"]),
    ],
)
def test_errors_suggest_sizes_that_fit(arguments, said):
    with pytest.raises(UserError) as caught:
        Geometry.of(*arguments)
    for words in said:
        assert words in str(caught.value)
