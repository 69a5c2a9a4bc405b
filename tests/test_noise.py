"""Denoising step by step, against its closed form."""

import itertools

import pytest
import torch
from tiny_prior import FakePrior

from models.diffusion import Condition
from models.noise import add_noise, ddim, edited_latents, signal


class Oracle(FakePrior):
    """Knows the clean latents, and so the noise."""

    clean = torch.linspace(-1, 1, 2 * 4 * 3 * 3).view(2, 4, 3, 3)

    def predict_noise(self, latents_t, t, text, *_):
        abar = signal(self, t)
        clean = self.clean.repeat(len(t) // 2, 1, 1, 1)
        return (latents_t - abar.sqrt() * clean) / (1 - abar).sqrt()


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_denoising_with_the_true_noise_arrives_at_the_clean_latents(guidance):
    prior, noise = Oracle(), torch.randn(2, 4, 3, 3)
    condition = Condition(torch.zeros(2, 5, 8))
    abar = signal(prior, torch.tensor([900, 900]))
    noisy = abar.sqrt() * prior.clean + (1 - abar).sqrt() * noise
    clean = ddim(prior, noisy, condition, [900, 600, 300, -1], guidance)
    torch.testing.assert_close(clean, prior.clean)
    abar = signal(prior, torch.tensor([300, 300]))
    between = ddim(prior, noisy, condition, [900, 300], guidance)
    torch.testing.assert_close(between, abar.sqrt() * prior.clean + (1 - abar).sqrt() * noise)


def test_a_step_of_ddim_is_the_closed_form():
    """eps_hat = s x_t, s from guidance between the two texts' means."""
    prior, x = FakePrior(), torch.randn(3, 4, 2, 2)
    text = torch.stack([torch.full((5, 8), 0.1), torch.full((5, 8), 0.3)])
    s = 0.1 + 2.0 * (0.3 - 0.1)
    now, then = (prior.alphas_cumprod[t] for t in (700, 500))
    clean = (1 - (1 - now).sqrt() * s) * x / now.sqrt()
    wanted = then.sqrt() * clean + (1 - then).sqrt() * s * x
    torch.testing.assert_close(ddim(prior, x, Condition(text), [700, 500], 2.0), wanted)


def test_inversion_leads_back_the_better_the_more_steps():
    prior, x = FakePrior(), torch.randn(3, 4, 2, 2)
    condition = Condition(torch.full((2, 5, 8), 0.3))
    errors = []
    for steps in (4, 32):
        up = torch.linspace(0, 600, steps + 1).int().tolist()
        noisy = ddim(prior, x, condition, up, 1.0)
        assert (noisy - x).abs().max() > 0.1
        errors.append((ddim(prior, noisy, condition, up[::-1], 1.0) - x).abs().max().item())
    assert errors[1] < errors[0] / 4


def test_guidance_and_depth_act_between_two_times():
    prior, x = FakePrior(), torch.randn(3, 4, 2, 2)
    condition = Condition(torch.stack([torch.full((5, 8), 0.1), torch.full((5, 8), 0.3)]))
    depth = torch.full((3, 3, 8, 8), 0.5)
    wanted = ddim(prior, x, condition, [800, 600], 1.0, depth)
    wanted = ddim(prior, wanted, condition, [600, 400], 3.0)
    wanted = ddim(prior, wanted, condition, [400, -1], 1.0)
    inputs = prior, x, condition, [800, 600, 400, -1], 3.0, depth
    between = ddim(*inputs, guided=(0.5, 0.7), held=(0.7, 1.0))
    torch.testing.assert_close(between, wanted)
    for other in ({"guided": (0.5, 0.7)}, {"held": (0.7, 1.0)}):
        assert (ddim(*inputs, **other) - wanted).abs().max() > 0.01


def edit_inputs():
    """Latents, and a condition: 0.1 everywhere, then 0.7 everywhere."""
    torch.manual_seed(0)  # Norms of what differs little are compared.
    text = torch.tensor([0.1, 0.7]).view(2, 1, 1).expand(2, 5, 6)
    return torch.randn(3, 4, 8, 8), Condition(text)


def test_edit_under_the_sources_own_prompt_is_the_source():
    latents, condition = edit_inputs()
    noise = torch.randn(6, 3, 1, *latents.shape[1:])
    edited = edited_latents(FakePrior(), latents, condition, condition, 0.9, 1.0, noise)
    torch.testing.assert_close(edited, latents)


def test_edit_of_one_step_moves_by_the_mean_difference_of_the_predictions():
    latents, condition = edit_inputs()
    source = Condition(torch.full_like(condition.text, 0.2))
    noise = torch.randn(1, 2, 1, *latents.shape[1:])
    edited = edited_latents(FakePrior(), latents, condition, source, 0.5, 2.0, noise)
    t = torch.tensor([500, 500, 500])
    abar, clean = (FakePrior.alphas_cumprod[i] for i in (500, 0))
    x_t = torch.stack([add_noise(FakePrior(), latents, t, draw) for draw in noise[0]]).mean(0)
    change = (0.1 + 2.0 * (0.7 - 0.1) - 0.2) * x_t
    fall = ((1 - clean) / clean).sqrt() - ((1 - abar) / abar).sqrt()
    torch.testing.assert_close(edited, latents + fall * change)


def test_edit_moves_further_under_more_guidance():
    latents, condition = edit_inputs()
    noise = torch.randn(8, 1, 1, *latents.shape[1:])
    small, large = (
        edited_latents(FakePrior(), latents, condition, condition, 0.9, guidance, noise) - latents
        for guidance in (1.5, 3.0)
    )
    assert large.norm() > small.norm() > 0.1


def test_guidance_and_depth_of_an_edit_act_between_two_times():
    latents, condition = edit_inputs()
    depth = torch.full((3, 3, 8, 8), 0.5)
    noise = torch.randn(2, 1, 1, *latents.shape[1:])  # Steps at 0.8 and 0.4.
    inputs = FakePrior(), latents, condition, condition, 0.8, 3.0, noise
    edits = {
        spans: edited_latents(*inputs, depth, *spans) - latents
        for spans in itertools.product([(0.9, 1.0), (0.5, 1.0), (0.0, 1.0)], repeat=2)
    }
    never, first, always = (0.9, 1.0), (0.5, 1.0), (0.0, 1.0)
    # The two conditions are the same, so that nothing changes where neither acts.
    torch.testing.assert_close(edits[never, never], torch.zeros_like(latents))
    for fewer, more in ((never, first), (first, always)):
        assert 0 <= edits[fewer, never].norm() < edits[more, never].norm()
        assert 0 <= edits[never, fewer].norm() < edits[never, more].norm()


def test_edits_of_several_draws_keep_each_samples_own_words_and_depth():
    latents, _ = edit_inputs()
    words = torch.linspace(0.1, 0.9, 6).view(2, 3, 1, 1).expand(2, 3, 5, 6)
    depth = torch.linspace(0.2, 0.8, 3).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    noise = torch.randn(3, 4, 1, *latents.shape[1:])

    def edit(some):
        conditions = [Condition(words[:, some]), Condition(words[:, some].flip(0))]
        inputs = FakePrior(), latents[some], *conditions, 0.9, 2.0, noise
        return edited_latents(*inputs, depth[some])

    alone = torch.cat([edit(slice(i, i + 1)) for i in range(3)])
    torch.testing.assert_close(edit(slice(3)), alone)
    assert (alone - latents).abs().amax((1, 2, 3)).min() > 0.01
