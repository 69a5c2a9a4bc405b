import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.cameras import CameraSetup
from models.renderer import pixel_rays
from puppets import domains, heads


def latents(count: int, seed: int = 5) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(count, heads.Z_DIM)).float()


def views(count: int) -> torch.Tensor:
    return CameraSetup().label(torch.linspace(-0.5, 0.5, count), torch.full((count,), -0.1))


def test_only_the_direction_of_a_latent_counts():
    z, c = latents(2), views(2)
    once, thrice = (heads.render(k * z, c, size=32)[0] for k in (1, 3))
    torch.testing.assert_close(once, thrice, atol=1e-3, rtol=0)


@pytest.mark.parametrize("domain", domains.DOMAINS)
def test_pictures_are_in_range_and_white_outside_the_mask(domain):
    rgb, depth, mask = heads.render(latents(2), views(2), domain, size=48)
    assert rgb.shape == (2, 3, 48, 48) and depth.shape == mask.shape == (2, 1, 48, 48)
    assert rgb.abs().max() <= 1 and 0.25 < mask.mean() < 0.75
    empty = (F.max_pool2d(mask, 5, 1, 2) == 0).expand_as(rgb)  # A pencil line is 2 px wide.
    assert (rgb[empty] == 1).all()
    assert (depth[mask > 0] > 2.2).all() and (depth[mask > 0] < 2.9).all()


def test_depth_lies_on_the_surface_it_was_traced_to():
    z, c = latents(1), views(1)
    head = heads.build(z)
    origin, direction = pixel_rays(c, 16)
    t, index = heads.trace(head, origin, direction)
    point = (origin + t.unsqueeze(-1) * direction)[t.isfinite()]
    hit = index[t.isfinite()]
    on = ((point - head.center[0, hit]) / head.radius[0, hit]).norm(dim=-1)
    torch.testing.assert_close(on, torch.ones_like(on), atol=2e-3, rtol=0)


def test_points_before_the_surface_are_empty_and_behind_it_solid():
    z, c = latents(1), views(1)
    head = heads.build(z)
    origin, direction = pixel_rays(c, 24)
    t, _ = heads.trace(head, origin, direction)
    hit = t.isfinite()
    step = torch.where(hit, t, 2.5).unsqueeze(-1)
    before = heads.occupied(head, origin + (step - 0.003) * direction)[hit]
    behind = heads.occupied(head, origin + (step + 0.003) * direction)[hit]
    assert before.float().mean() < 0.02  # Looking up under the hair, into its shell.
    assert behind.float().mean() > 0.95  # Grazing rays leave again within three millimetres.


def test_a_head_has_one_colour_from_every_side():
    z = latents(1)
    head = heads.build(z, "bronze")
    point = torch.tensor([[[0.02, 0.05, heads.HEAD_Z + 0.16]]])
    colors = []
    for eye in ([0.3, 0.1, 2.6], [-0.8, 0.4, 2.4]):
        origin = torch.tensor([[eye]])
        direction = F.normalize(point - origin, dim=-1)
        t, index = heads.trace(head, origin, direction)
        colors.append(heads.shade(head, origin + t.unsqueeze(-1) * direction, index))
    torch.testing.assert_close(colors[0], colors[1], atol=0.05, rtol=0)


def test_domains_keep_the_silhouette_unless_they_reshape():
    z, c = latents(1), views(1)
    source = heads.render(z, c, size=32)[2]
    assert torch.equal(heads.render(z, c, "bronze", size=32)[2], source)
    assert not torch.equal(heads.render(z, c, "clown", size=32)[2], source)


def test_captions_name_the_domain_and_an_odd_hair_colour():
    rng = np.random.default_rng(0)
    z = latents(1)[0]
    texts = [heads.caption(z, "person", rng, hair="green") for _ in range(20)]
    assert all("green hair" in text for text in texts)
    assert {heads.caption(z, "bronze", rng).split(" with")[0] for _ in range(50)} == set(
        domains.DOMAINS["bronze"].phrases
    )


def test_enough_domains_and_some_held_out():
    assert len(domains.TARGETS) >= 10 and domains.SOURCE not in domains.TARGETS
    assert set(domains.HELD_OUT) < set(domains.TARGETS) and len(domains.HELD_OUT) >= 3
