"""The probe that finds faces, on true pictures of heads that it was not fitted on."""

import torch

from models.features import ClipFeatures
from puppets import faces
from puppets.data import DOMAIN_NAMES, ROUND_CAMERAS
from puppets.heads import Z_DIM, render


def test_faces_are_found_in_front_and_not_behind():
    clip = ClipFeatures.from_pretrained("checkpoints/puppets/clip")
    torch.manual_seed(0)
    for yaw, wanted in ((0.0, 1.0), (torch.pi, 0.0)):
        yaws = yaw + 0.9 * (2 * torch.rand(39) - 1)
        c = ROUND_CAMERAS.label(yaws, 0.3 * torch.rand(39))
        assert faces.back_views(c).all() == (wanted == 0)
        domains = [DOMAIN_NAMES[i % 13] for i in range(39)]
        z = torch.randn(39, Z_DIM)
        pictures = [render(z[i : i + 1], c[i : i + 1], d)[0] for i, d in enumerate(domains)]
        assert abs(faces.share(clip, torch.cat(pictures)) - wanted) < 0.06


def test_views_from_behind_are_a_third_of_all():
    torch.manual_seed(0)
    share = faces.back_views(ROUND_CAMERAS.sample(3000)).float().mean()
    assert abs(share - 1 / 3) < 0.03
