"""Objectives against closed forms, on a prior whose prediction is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_prior import FakePrior

from losses import (
    EMPHASIS,
    clip_direction_loss,
    coarse_to_fine,
    denoised_latents,
    denoised_loss,
    dsds_loss,
    edit_mask,
    fusion_sds_loss,
    grown_mask,
    hsc_loss,
    keep_loss,
    perceptual_loss,
    relative_distance_loss,
    score_direction_loss,
    score_reconstruction_loss,
    silhouette_loss,
    source_noise,
    structure_loss,
    target_loss,
)
from models.diffusion import Condition
from models.noise import add_noise, guided_noise

GUIDANCE = 7.5


def sds_inputs(image_embeds=None, image_scale=1.0):
    """Latents, a condition (0.1 everywhere, then 0.7 everywhere), times and noise for B = 3."""
    torch.manual_seed(0)
    latents = torch.randn(3, 4, 8, 8, requires_grad=True)
    text = torch.tensor([0.1, 0.7]).view(2, 1, 1).expand(2, 5, 6)
    t = torch.tensor([20, 500, 980])
    condition = Condition(text, image_embeds, image_scale)
    return latents, condition, t, torch.randn(3, 4, 8, 8)


def closed_form(latents, t, noise, shift=0.0):
    """Gradient of SDS for FakePrior when depth or picture add `shift` to eps_hat."""
    abar = FakePrior.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = abar.sqrt() * latents.detach() + (1 - abar).sqrt() * noise
    eps_hat = (0.1 + GUIDANCE * (0.7 - 0.1)) * x_t + shift
    return (1 - abar) * (eps_hat - noise)


def test_sds_gradient_is_the_closed_form():
    latents, condition, t, noise = sds_inputs()
    dsds_loss(FakePrior(), latents, condition, t, noise, GUIDANCE).sum().backward()
    torch.testing.assert_close(latents.grad, closed_form(latents, t, noise))


def test_sds_value_is_half_the_squared_gradient_of_each_image():
    latents, condition, t, noise = sds_inputs()
    loss = dsds_loss(FakePrior(), latents, condition, t, noise, GUIDANCE)
    expected = 0.5 * closed_form(latents, t, noise).square().sum((1, 2, 3))
    torch.testing.assert_close(loss, expected)


def test_dsds_gradient_uses_depth_and_acts_inside_the_mask_only():
    latents, condition, t, noise = sds_inputs()
    depth = torch.tensor([0.2, 0.4, 0.8]).view(3, 1, 1, 1).expand(3, 3, 64, 64)
    mask = torch.zeros(3, 1, 16, 16)
    mask[:, :, 4:12, 3:12] = 1.0  # Latent cells 2-5, and half of column 1.
    dsds_loss(FakePrior(), latents, condition, t, noise, GUIDANCE, depth, mask).sum().backward()
    cells = torch.zeros(3, 1, 8, 8)
    cells[:, :, 2:6, 2:6] = 1.0
    cells[:, :, 2:6, 1] = 0.5
    expected = cells * closed_form(latents, t, noise, shift=depth[:, :1, :1, :1])
    torch.testing.assert_close(latents.grad, expected)
    assert (latents.grad[:, :, :2] == 0).all()


def test_dsds_with_a_full_mask_is_sds_with_the_same_depth():
    latents, condition, t, noise = sds_inputs()
    depth, mask = torch.rand(3, 3, 64, 64), torch.ones(3, 1, 16, 16)
    inputs = (FakePrior(), latents, condition, t, noise, GUIDANCE)
    torch.testing.assert_close(dsds_loss(*inputs, depth, mask), dsds_loss(*inputs, depth=depth))


def test_delta_compares_with_what_the_prior_sees_in_the_source():
    latents, condition, t, noise = sds_inputs()
    latents_src = torch.randn_like(latents)
    condition_src = Condition(torch.full_like(condition.text, 0.3))
    baseline = source_noise(FakePrior(), latents_src, condition_src, t, noise, GUIDANCE)
    inputs = (FakePrior(), latents, condition, t, noise, GUIDANCE)
    dsds_loss(*inputs, baseline=baseline).sum().backward()
    abar = FakePrior.alphas_cumprod[t].view(-1, 1, 1, 1)
    latents_t, source_t = (
        abar.sqrt() * x + (1 - abar).sqrt() * noise for x in (latents, latents_src)
    )
    expected = (1 - abar) * ((0.1 + GUIDANCE * 0.6) * latents_t - 0.3 * source_t)
    torch.testing.assert_close(latents.grad, expected.detach())
    same = source_noise(*inputs[:1], latents.detach(), *inputs[2:])
    latents.grad = None
    dsds_loss(*inputs, baseline=same).sum().backward()
    assert not latents.grad.any()  # Nothing to change in what is the source under its own words.


def test_guidance_drops_text_and_picture_together():
    picture = torch.tensor([0.0, 0.3]).view(2, 1, 1).expand(2, 1, 6)
    latents, condition, t, _ = sds_inputs(picture, image_scale=0.6)
    eps_hat = guided_noise(FakePrior(), latents, t, condition, GUIDANCE)
    unconditional, conditional = 0.1 * latents, 0.7 * latents + 0.6 * 0.3
    torch.testing.assert_close(eps_hat, unconditional + GUIDANCE * (conditional - unconditional))


def test_guidance_one_is_the_conditional_and_zero_the_unconditional_prediction():
    latents, condition, t, _ = sds_inputs()
    for guidance, factor in ((1.0, 0.7), (0.0, 0.1)):
        eps_hat = guided_noise(FakePrior(), latents, t, condition, guidance)
        torch.testing.assert_close(eps_hat, factor * latents)


def test_a_step_along_the_gradient_moves_latents_towards_what_the_prior_likes():
    # A prior that has seen only `liked` predicts exactly the noise that leads back to it.
    latents, condition, t, noise = sds_inputs()
    liked = torch.full_like(latents, 0.5)

    class Oracle(FakePrior):
        def predict_noise(self, latents_t, t, *_):
            abar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
            return (latents_t - abar.sqrt() * liked.repeat(2, 1, 1, 1)) / (1 - abar).sqrt()

    dsds_loss(Oracle(), latents, condition, t, noise, GUIDANCE).sum().backward()
    stepped = latents - 0.1 * latents.grad
    assert ((stepped - liked).abs() < (latents - liked).abs()).all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("condition.text", {"condition": Condition(torch.zeros(1, 5, 6))}),
        ("t", {"t": torch.tensor([3])}),
        ("noise", {"noise": torch.zeros(3, 4, 4, 4)}),
        ("depth", {"depth": torch.zeros(3, 1, 64, 64)}),
        ("mask", {"mask": torch.zeros(3, 16, 16)}),
    ],
)
def test_wrong_shapes_are_named(name, change):
    latents, condition, t, noise = sds_inputs()
    inputs = {"condition": condition, "t": t, "noise": noise}
    with pytest.raises(ValueError, match=f"^{name} must be"):
        dsds_loss(FakePrior(), latents, guidance=GUIDANCE, **(inputs | change))


def test_hsc_equals_info_nce_worked_out_by_hand():
    source = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.6, 0.8]]])[None]
    adapted = torch.tensor([[[0.8, 0.6], [0.0, 2.0]], [[0.0, -3.0], [1.0, 0.0]]])[None]
    cells, sources = adapted.view(4, 2).tolist(), source.view(4, 2).tolist()
    expected = 0.0
    for i, a in enumerate(cells):
        cosines = [(a[0] * s[0] + a[1] * s[1]) / math.hypot(*a) for s in sources]
        weights = [math.exp(cosine / 0.5) for cosine in cosines]
        expected -= math.log(weights[i] / sum(weights)) / 4
    loss = hsc_loss(adapted, source, grids=(None,), weights=(1.0,), temperature=0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_hsc_is_lowest_where_every_cell_is_at_its_own_place():
    tokens = torch.eye(16).view(1, 4, 4, 16)  # Sixteen cells that have nothing in common.
    matched = hsc_loss(tokens, tokens, grids=(None,), weights=(1.0,))
    assert matched.item() == pytest.approx(math.log(1 + 15 * math.exp(-10)), rel=1e-3)
    for seed in range(5):
        order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
        shuffled = tokens.view(1, 16, 16)[:, order].view_as(tokens)
        assert hsc_loss(tokens, shuffled, grids=(None,), weights=(1.0,)) > matched + 1


def test_hsc_judges_every_image_by_itself():
    torch.manual_seed(0)
    tokens, source = torch.randn(2, 3, 8, 8, 5)
    alone = torch.cat([hsc_loss(a[None], s[None]) for a, s in zip(tokens, source, strict=True)])
    torch.testing.assert_close(hsc_loss(tokens, source), alone)


def test_hsc_counts_cells_by_their_share_of_the_mask():
    tokens, source = torch.randn(2, 2, 4, 4, 6)  # [B, g, g, D] each.
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :2, :2], mask[1, :, 6:, 2:4] = 1, 1  # Cells (0, 0) and (3, 1).
    loss = hsc_loss(tokens, source, grids=(None,), weights=(1.0,), mask=mask)
    adapted, true = (F.normalize(x, dim=-1).flatten(1, 2) for x in (tokens, source))
    cosines = adapted @ true.mT  # [B, 16, 16]
    nce = -(10 * cosines).log_softmax(2).diagonal(dim1=1, dim2=2)  # [B, 16]
    torch.testing.assert_close(loss, torch.stack([nce[0, 0], nce[1, 13]]))
    levels = {"grids": (2, None), "weights": (0.7, 0.2)}
    everywhere = hsc_loss(tokens, source, mask=torch.ones(2, 1, 8, 8), **levels)
    torch.testing.assert_close(everywhere, hsc_loss(tokens, source, **levels))
    assert hsc_loss(tokens, source, mask=torch.zeros(2, 1, 8, 8), **levels).eq(0).all()


def test_hsc_averages_tokens_to_each_levels_grid_and_weighs_the_levels():
    torch.manual_seed(0)
    tokens, source = torch.randn(2, 2, 4, 4, 5)
    blocks = [x.view(2, 2, 2, 2, 2, 5).mean((2, 4)) for x in (tokens, source)]  # [2, 2, 2, 5]
    coarse = hsc_loss(*blocks, grids=(None,), weights=(1.0,))
    fine = hsc_loss(tokens, source, grids=(None,), weights=(1.0,))
    both = hsc_loss(tokens, source, grids=(2, None), weights=(0.7, 0.2))
    torch.testing.assert_close(both, 0.7 * coarse + 0.2 * fine)


def test_hsc_gradient_reaches_the_adapted_tokens_only():
    torch.manual_seed(0)
    tokens, source = (torch.randn(2, 8, 8, 5, requires_grad=True) for _ in range(2))
    hsc_loss(tokens, source).sum().backward()
    assert tokens.grad.abs().sum() > 0
    assert source.grad is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens_src": torch.zeros(1, 4, 4, 3)}, "tokens_src must be"),
        ({"tokens": torch.zeros(1, 16, 5)}, "tokens must be"),
        ({"grids": (4, 32)}, "do not fit 8 x 8"),
        ({"weights": (1.0,)}, "do not fit 8 x 8"),
    ],
)
def test_hsc_refuses_what_does_not_fit(change, reason):
    inputs = {"tokens": torch.zeros(1, 8, 8, 5), "tokens_src": torch.zeros(1, 8, 8, 5)}
    with pytest.raises(ValueError, match=reason):
        hsc_loss(**(inputs | change))


def test_level_weights_sum_to_one_and_move_from_coarse_to_fine():
    over_time = [coarse_to_fine(step / 10, (4, 3, 2, 1), (1, 2, 3, 4)) for step in range(11)]
    assert all(sum(weights) == pytest.approx(1) and min(weights) > 0 for weights in over_time)
    means = [sum(level * weight for level, weight in enumerate(w)) for w in over_time]
    assert means == sorted(means) and means[0] < means[-1]
    assert over_time[0] == tuple(reversed(over_time[-1]))
    assert over_time[5] == pytest.approx((0.25,) * 4)
    with pytest.raises(ValueError, match="progress"):
        coarse_to_fine(1.01)
    assert coarse_to_fine(0.3, (0, 5), (0, 1)) == pytest.approx((0, 1))


# StyleGAN-Fusion.


def unit(x):
    """Scale each entry of a batch to an RMS of 1, by its norm."""
    return x * (x[0].numel() ** 0.5 / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


def predicted(latents, t, noise):
    """Noise that FakePrior predicts with guidance, and the signal's share."""
    abar = FakePrior.alphas_cumprod[t].view(-1, 1, 1, 1)
    latents_t = abar.sqrt() * latents.detach() + (1 - abar).sqrt() * noise
    return (0.1 + GUIDANCE * 0.6) * latents_t, abar


def test_fusion_gradient_is_the_closed_form():
    latents, condition, t, noise = sds_inputs()
    fusion_sds_loss(FakePrior(), latents, condition, t, noise, GUIDANCE).sum().backward()
    eps_hat, abar = predicted(latents, t, noise)
    expected = (1 - abar) * (unit(eps_hat) - unit(noise)) / 100
    torch.testing.assert_close(latents.grad, expected, rtol=1e-4, atol=1e-7)


def test_fusion_gradient_to_a_baseline_is_the_closed_form():
    latents, condition, t, noise = sds_inputs()
    baseline = noise.roll(1, 0)
    inputs = (condition, t, noise, GUIDANCE, baseline)
    fusion_sds_loss(FakePrior(), latents, *inputs).sum().backward()
    eps_hat, abar = predicted(latents, t, noise)
    expected = (1 - abar) * (unit(eps_hat) - unit(baseline)) / 100
    torch.testing.assert_close(latents.grad, expected, rtol=1e-4, atol=1e-7)


def test_fusion_gradient_is_blind_to_the_size_of_the_prediction():
    latents, condition, t, noise = sds_inputs()
    gradients = []
    for guidance in (7.5, 100.0):  # FakePrior's direction is the same at any guidance.
        loss = fusion_sds_loss(FakePrior(), latents, condition, t, noise, guidance)
        gradients.append(torch.autograd.grad(loss.sum(), latents)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_fusion_gradient_is_clamped():
    class Spike(FakePrior):
        def predict_noise(self, latents_t, *_):
            eps = torch.zeros_like(latents_t)
            eps[:, 0, 0, 0] = 1  # Of a latent of 4 * 64 * 64: an RMS of 1 / 128.
            return eps

    latents = torch.zeros(1, 4, 64, 64, requires_grad=True)
    condition, t = sds_inputs()[1], torch.tensor([999])
    noise = torch.full((1, 4, 64, 64), 1.0)
    fusion_sds_loss(Spike(), latents, condition, t, noise, 1.0).sum().backward()
    assert latents.grad[0, 0, 0, 0] == 1  # 0.99 * (128 - 1) / 100 is more.
    torch.testing.assert_close(latents.grad[0, 0, 0, 1].item(), -0.99 / 100)


def test_score_direction_is_zero_at_the_source_and_closed_form_elsewhere():
    latents, condition, t, noise = sds_inputs()
    latents_src = torch.randn(3, 4, 8, 8)
    inputs = (condition, t, noise, GUIDANCE)
    alike = score_direction_loss(FakePrior(), latents, latents.detach().clone(), *inputs)
    assert torch.autograd.grad(alike.sum(), latents)[0].eq(0).all()
    score_direction_loss(FakePrior(), latents, latents_src, *inputs).sum().backward()
    (eps_hat, abar), (eps_src, _) = (predicted(x, t, noise) for x in (latents, latents_src))
    expected = (1 - abar) * (unit(eps_hat) - unit(eps_src)) / 100
    torch.testing.assert_close(latents.grad, expected, rtol=1e-4, atol=1e-7)


def test_score_reconstruction_follows_the_gradient_of_the_clean_latents():
    latents, condition, t, noise = sds_inputs()
    latents_src = torch.randn(3, 4, 8, 8)
    inputs = (condition, t, noise, GUIDANCE)
    score_reconstruction_loss(FakePrior(), latents, latents_src, *inputs).sum().backward()
    eps_hat, abar = predicted(latents, t, noise)
    latents_t = abar.sqrt() * latents.detach() + (1 - abar).sqrt() * noise
    eps = eps_hat.clone().requires_grad_()
    clean = (latents_t - (1 - abar).sqrt() * eps) / abar.sqrt()
    r = torch.autograd.grad((clean - latents_src).square().sum(), eps)[0]
    expected = (1 - abar) * (unit(eps_hat) - unit(r)) / 100
    torch.testing.assert_close(latents.grad, expected, rtol=1e-3, atol=1e-6)


def test_perceptual_distance_by_hand():
    right, up = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    tokens = torch.stack([right, 5 * up, -right, right]).view(1, 2, 2, 2)
    tokens_src = right.expand(1, 2, 2, 2)
    # Squared distances 0, 2, 4, 0 in one layer, 0 in the other.
    loss = perceptual_loss([tokens, tokens_src], [3 * tokens_src, tokens_src])
    assert loss.tolist() == pytest.approx([6 / 4 / 2])


# DiffusionGAN3D.


def test_relative_distance_by_hand():
    planes_src = torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1, 1, 1)  # Squares 1, 9, 4.
    planes = torch.tensor([0.0, 2.0, 3.0]).view(3, 1, 1, 1, 1)  # Squares 4, 9, 1.
    loss = relative_distance_loss(planes, planes_src, planes, planes_src)
    far, same, near = 4 / 1 - 1, 0, 1 - 1 / 4
    expected = [(far + same) / 2, (far + near) / 2, (same + near) / 2]
    assert loss.tolist() == pytest.approx(expected, rel=1e-4)


def test_relative_distance_ignores_what_moves_all_heads_alike():
    planes_src = torch.randn(4, 3, 2, 5, 5)
    moved = planes_src + torch.randn(3, 2, 5, 5)
    loss = relative_distance_loss(moved, planes_src, moved, planes_src)
    assert loss.max() < 1e-4
    collapsed = torch.ones_like(planes_src)
    loss = relative_distance_loss(collapsed, planes_src, collapsed, planes_src)
    torch.testing.assert_close(loss, torch.ones(4))


def test_relative_distance_drives_collapsing_heads_apart():
    planes_src = torch.randn(3, 3, 2, 4, 4)
    planes = (0.5 * planes_src).requires_grad_()
    relative_distance_loss(planes, planes_src, planes, planes_src).mean().backward()
    stepped = (planes - 0.1 * planes.grad).detach()
    assert torch.pdist(stepped.flatten(1)).min() > torch.pdist(planes.detach().flatten(1)).min()


def test_relative_distance_of_a_part_is_that_part_of_the_whole():
    planes, planes_src = torch.randn(2, 4, 3, 2, 4, 4)
    whole, part = (planes[rows].clone().requires_grad_() for rows in (slice(0, 4), slice(1, 3)))
    losses = relative_distance_loss(whole, planes_src, planes, planes_src)
    some = relative_distance_loss(part, planes_src[1:3], planes, planes_src, first=1)
    torch.testing.assert_close(some, losses[1:3])
    gradient = torch.autograd.grad(losses.sum(), whole)[0]
    torch.testing.assert_close(torch.autograd.grad(some.sum(), part)[0], gradient[1:3])
    together = planes.clone().requires_grad_()
    ratios = torch.pdist(together.flatten(1)).square() / torch.pdist(planes_src.flatten(1)).square()
    (4 * (ratios - 1).abs().mean()).backward()
    torch.testing.assert_close(2 * gradient, together.grad)


def test_grown_mask_is_the_source_and_what_changed_on_its_background():
    image = torch.ones(1, 3, 8, 8)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :1] = 0.5
    painted = image.clone()
    painted[:, 1, :, 4:6] = -0.5  # One channel is enough; a cell is 2 x 2 pixels.
    painted[:, :, :, 6:] = 0.95  # A tint of the background is none.
    grown = grown_mask(painted, image, mask)
    assert grown[0, 0, 0].tolist() == [0.5, 0, 1, 0]
    painted[:, :, :, 6:] = 1 - 0.65  # Half-way.
    assert grown_mask(painted, image, mask)[0, 0, 0, 3].item() == pytest.approx(0.5)


def test_a_recoloured_outline_has_not_grown():
    image, mask = torch.ones(1, 3, 8, 8), torch.full((1, 1, 4, 4), 0.4)
    black = image - 2 * 0.4 * 0.99  # What is a head to 0.4 was white, and is black now.
    assert torch.equal(grown_mask(black, image, mask), mask)
    assert (grown_mask(image - 2 * 0.6, image, mask) == 1).all()


def test_growth_counts_more_in_pixels_averages_and_silhouettes():
    targets, images = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    mask, shape = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    for grown in (0.0, 0.5, 1.0):
        more = torch.full_like(mask, grown)
        times = 1 + EMPHASIS * grown**2
        for loss, inputs in ((denoised_loss, (images, targets)), (silhouette_loss, (mask, shape))):
            assert loss(*inputs, grown=more).item() == pytest.approx(times * loss(*inputs).item())
    half = torch.zeros_like(mask)
    half[..., 2:] = 1  # Nothing grows in the left half, and pictures differ at its edge alone.
    images[..., 4:] = 0
    assert denoised_loss(images, targets, grown=half) == denoised_loss(images, targets)


def test_silhouette_is_the_mean_difference_but_does_not_pull_at_rounding():
    mask = torch.tensor([0.0, 0.5, 0.3, 0.3]).view(1, 1, 1, 4).requires_grad_()
    target = torch.tensor([1.0, 0.0, 0.3 - 1e-6, 0.3]).view(1, 1, 1, 4).requires_grad_()
    loss = silhouette_loss(mask, target)
    assert loss.item() == pytest.approx((0.95 + 0.45) / 4)  # Less half of what is quadratic.
    loss.sum().backward()
    assert mask.grad.flatten()[:2].tolist() == [-0.25, 0.25] and target.grad is None
    assert mask.grad.flatten()[2:].abs().max() < 1e-5


class Painter(FakePrior):
    """A prior to whose prompt only the upper left quarter of a latent matters."""

    def predict_noise(self, latents_t, t, text, *_):
        where = torch.zeros_like(latents_t)
        where[:, :, :4, :4] = 1
        return latents_t + where * text.mean((1, 2)).view(-1, 1, 1, 1)


def test_edit_mask_is_where_the_prompt_matters():
    latents, condition, _, noise = sds_inputs()
    mask = edit_mask(Painter(), latents, condition, noise, levels=(0.3, 0.7))
    assert mask.shape == (3, 1, 8, 8) and not mask.requires_grad
    assert mask[:, :, :3, :3].min() > 0.99 and mask[:, :, 5:].max() < 0.02
    assert mask[:, :, :, 5:].max() < 0.02


class LouderPainter(FakePrior):
    """A prior that answers ten times as loud, and elsewhere, at late times."""

    def predict_noise(self, latents_t, t, text, *_):
        where, late = torch.zeros_like(latents_t), (t >= 500).view(-1, 1, 1, 1)
        where[:, :, :3, :3] = 1
        elsewhere = where.flip(2, 3)
        where = torch.where(late, 10 * elsewhere, where)
        return latents_t + where * text.mean((1, 2)).view(-1, 1, 1, 1)


def test_levels_of_an_edit_mask_count_alike():
    latents, condition, _, noise = sds_inputs()
    mask = edit_mask(LouderPainter(), latents, condition, noise, levels=(0.3, 0.7))
    torch.testing.assert_close(mask, mask.flip(2, 3))
    assert mask[:, :, 1, 1].min() > 0.99


def test_keep_loss_counts_what_lies_outside_the_mask():
    images, images_src = torch.zeros(2, 3, 4, 4, requires_grad=True), torch.ones(2, 3, 4, 4)
    images_src[1] *= 2
    mask = torch.zeros(2, 1, 4, 4)
    mask[:, :, :1] = 1
    loss = keep_loss(images, images_src, mask)
    assert loss.tolist() == pytest.approx([0.75, 3.0])
    loss.sum().backward()
    assert images.grad[:, :, 0].eq(0).all() and images.grad[:, :, 1:].lt(0).all()


# StyleGAN-NADA.


def test_clip_direction_by_hand():
    right = torch.tensor([[1.0, 0.0]])
    source = torch.zeros(4, 2)
    moved = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [1.0, 1.0]])
    loss = clip_direction_loss(moved, source, right)
    assert loss.tolist() == pytest.approx([0, 1, 2, 1 - 0.5**0.5])
    shifted = clip_direction_loss(moved + 7, source + 7, right)
    torch.testing.assert_close(shifted, loss)


def test_clip_direction_starts_with_a_finite_gradient_along_the_direction():
    source = F.normalize(torch.randn(2, 5), dim=1)
    direction = F.normalize(torch.randn(1, 5), dim=1)
    embeds = source.clone().requires_grad_()
    clip_direction_loss(embeds, source, direction, shortest=0.1).sum().backward()
    torch.testing.assert_close(embeds.grad, -direction.expand(2, 5) / 0.1)


# 3D-Adapter.


def test_target_distance_by_hand():
    x, y, z = torch.eye(3)
    image = torch.stack([x, x, 4 * x, y]).view(1, 2, 2, 3)
    reference = torch.stack([x, z, z, 2 * z]).view(1, 2, 2, 3)
    # Of the image's tokens one finds nothing like it, of the reference's three.
    assert target_loss(image, reference).tolist() == pytest.approx([3 / 4])
    assert target_loss(reference, image).tolist() == pytest.approx([3 / 4])


def test_target_distance_is_blind_to_places():
    tokens = torch.randn(2, 4, 4, 5)
    moved = tokens.flip(1).transpose(1, 2)
    assert target_loss(tokens[:1], moved[:1]).item() == pytest.approx(0, abs=1e-5)
    assert target_loss(tokens[1:], moved[:1]).item() > 0.05


def test_structure_by_hand_and_blind_to_rotation_of_features():
    x, y = torch.eye(2)
    alike, apart = torch.stack([x, 3 * x]), torch.stack([x, 2 * y])
    loss = structure_loss(alike.view(1, 1, 2, 2), apart.view(1, 1, 2, 2))
    assert loss.tolist() == pytest.approx([2 / 4])  # Two of four cosines: 1 and 0.
    tokens, rotation = torch.randn(2, 4, 4, 6), torch.linalg.qr(torch.randn(6, 6))[0]
    assert structure_loss(2 * tokens @ rotation, tokens).max() < 1e-10
    assert structure_loss(tokens.flip(1), tokens).min() > 0.01


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_masks_of_any_type_count_alike(dtype):
    latents, condition, t, noise = sds_inputs()
    depth, mask = torch.rand(3, 3, 64, 64), torch.rand(3, 1, 16, 16) > 0.5
    inputs = (FakePrior(), latents, condition, t, noise, GUIDANCE, depth)
    assert torch.equal(dsds_loss(*inputs, mask.to(dtype)), dsds_loss(*inputs, mask.float()))
    tokens, source = torch.randn(2, 3, 8, 8, 5)
    masked = hsc_loss(tokens, source, mask=mask.to(dtype))
    assert torch.equal(masked, hsc_loss(tokens, source, mask=mask.float()))


@pytest.mark.parametrize("t", [[-1, 0, 0], [0, 0, 1000], [0.5, 0.5, 0.5]])
def test_times_outside_of_the_schedule_are_refused(t):
    latents, condition, _, noise = sds_inputs()
    with pytest.raises(ValueError, match="t must be steps from 0 to"):
        dsds_loss(FakePrior(), latents, condition, torch.tensor(t), noise, GUIDANCE)


@pytest.mark.parametrize("bad", [{"grids": (0, 1, 2)}, {"grids": ()}, {"temperature": 0}])
def test_levels_and_temperatures_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="levels|temperature"):
        hsc_loss(*torch.randn(2, 1, 8, 8, 5), **bad)


def test_target_from_noise_is_the_clean_prediction_where_one_step_is_taken():
    latents, condition, _, noise = sds_inputs()
    painted = denoised_latents(
        FakePrior(), latents, condition, condition, 0.5, 1, GUIDANCE, noise=noise[:1]
    )
    t = torch.tensor([500, 500, 500])
    abar = FakePrior.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = add_noise(FakePrior(), latents.detach(), t, noise[:1])
    eps_hat = (0.1 + GUIDANCE * (0.7 - 0.1)) * x_t
    torch.testing.assert_close(painted, (x_t - (1 - abar).sqrt() * eps_hat) / abar.sqrt())


def test_target_from_inversion_is_the_source_under_its_own_prompt():
    latents, condition, *_ = sds_inputs()
    painted = [
        denoised_latents(FakePrior(), latents, condition, condition, 0.5, steps, 1.0)
        for steps in (16, 64)
    ]
    errors = [(x - latents).abs().max().item() for x in painted]
    assert errors[1] < errors[0] / 3 and errors[1] < 0.03


def test_target_from_inversion_is_another_under_another_prompt():
    latents, condition, *_ = sds_inputs()
    other = Condition(torch.full_like(condition.text, 0.2))
    same, changed = (
        denoised_latents(FakePrior(), latents, under, condition, 0.5, 16, 1.0)
        for under in (condition, other)
    )
    assert (changed - same).abs().mean() > 0.1


def test_denoised_loss_counts_pixels_and_averages():
    targets = torch.zeros(2, 3, 8, 8, requires_grad=True)
    checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2 - 1.0  # +-1, of mean 0.
    images = torch.stack([torch.full((3, 8, 8), 0.5), checks.expand(3, 8, 8)])
    loss = denoised_loss(images, targets)
    torch.testing.assert_close(loss, torch.tensor([1.0, 1.0]))
    assert not loss.requires_grad
