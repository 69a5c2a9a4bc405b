"""Objectives against closed forms, on a prior whose prediction is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_prior import FakePrior

from losses import coarse_to_fine, dsds_loss, guided_noise, hsc_loss, sds_loss
from models.diffusion import Condition

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
    sds_loss(FakePrior(), latents, condition, t, noise, GUIDANCE).sum().backward()
    torch.testing.assert_close(latents.grad, closed_form(latents, t, noise))


def test_sds_value_is_half_the_squared_gradient_of_each_image():
    latents, condition, t, noise = sds_inputs()
    loss = sds_loss(FakePrior(), latents, condition, t, noise, GUIDANCE)
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
    torch.testing.assert_close(dsds_loss(*inputs, depth, mask), sds_loss(*inputs, depth=depth))


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

    sds_loss(Oracle(), latents, condition, t, noise, GUIDANCE).sum().backward()
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
        sds_loss(FakePrior(), latents, guidance=GUIDANCE, **(inputs | change))


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
    over_time = [coarse_to_fine(step / 10, levels=4) for step in range(11)]
    assert all(sum(weights) == pytest.approx(1) and min(weights) > 0 for weights in over_time)
    means = [sum(level * weight for level, weight in enumerate(w)) for w in over_time]
    assert means == sorted(means) and means[0] < means[-1]
    assert over_time[0] == tuple(reversed(over_time[-1]))
    assert over_time[5] == pytest.approx((0.25,) * 4)
    with pytest.raises(ValueError, match="progress"):
        coarse_to_fine(1.01)


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
        sds_loss(FakePrior(), latents, condition, torch.tensor(t), noise, GUIDANCE)


@pytest.mark.parametrize("bad", [{"grids": (0, 1, 2)}, {"grids": ()}, {"temperature": 0}])
def test_levels_and_temperatures_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="levels|temperature"):
        hsc_loss(*torch.randn(2, 1, 8, 8, 5), **bad)
