"""Denoising step by step, against its closed form."""

import pytest
import torch
from tiny_prior import FakePrior

from models.diffusion import Condition
from models.noise import ddim, signal


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
