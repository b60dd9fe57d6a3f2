"""Our diffusers folders in diffusers itself: the same latents and images, statistics included."""

import pytest
import torch

from src.formats.diffusers import write_diffusers
from tests.tiny_models import tiny_rae

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("family", ["dinov2", "mae"])
def test_diffusers_encodes_and_decodes_as_we_do(tmp_path, family, statistics):
    rae = tiny_rae(tmp_path, family, 256, statistics=statistics)
    for parameter in rae.encoder.parameters():  # or biases would be zero, and norms one
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    write_diffusers(rae, tmp_path)
    theirs = diffusers.AutoencoderRAE.from_pretrained(tmp_path).eval()
    images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        latents = rae.encode(images)
        assert (theirs.encode(images).latent - latents).abs().max() < 1e-5
        assert (theirs.decode(latents).sample - rae.decode(latents)).abs().max() < 1e-5
        assert (theirs(images).sample - rae(images)).abs().max() < 1e-5
        assert latents.std() > 0.1


def test_diffusers_and_siglip2(tmp_path):
    """The remark of the export is true as long as this holds: then the parity test above should take SigLIP2 in."""
    write_diffusers(tiny_rae(tmp_path, "siglip2", 256), tmp_path)
    with pytest.raises(AttributeError, match="vision_model"):
        diffusers.AutoencoderRAE.from_pretrained(tmp_path)
