from __future__ import annotations

import pytest
import torch

from itd import SAE, SAEConfig
from itd.metrics.reconstruction import reconstruction_of


def test_the_unexplained_variance_is_the_autoencoders_own(sae: SAE) -> None:
    x = torch.randn(200, sae.config.d_model, generator=torch.Generator().manual_seed(0))
    found = reconstruction_of(sae, x, batch_size=64)
    assert found.fvu == pytest.approx(sae.fvu(x), rel=1e-4)
    assert 0 < found.l0 <= sae.config.k
    assert 0 < found.live_share <= 1
    assert -1 <= found.cosine <= 1


def signed_basis(d_model: int, k: int) -> SAE:
    """An autoencoder of both directions of every axis, which with k = d_model is exact."""
    rows = torch.cat([torch.eye(d_model), -torch.eye(d_model)])
    b_dec = torch.randn(d_model, generator=torch.Generator().manual_seed(2))
    return SAE(SAEConfig(d_model, 2 * d_model, k), rows, torch.zeros(2 * d_model), rows, b_dec)


def test_a_complete_dictionary_keeps_everything_and_a_short_code_does_not() -> None:
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    exact, short = reconstruction_of(signed_basis(6, 6), x), reconstruction_of(signed_basis(6, 1), x)
    assert exact.fvu < 1e-10
    assert (exact.cosine, exact.l0, exact.live_share) == pytest.approx((1.0, 6.0, 1.0), abs=1e-5)
    assert short.fvu > 0.2
    assert short.l0 == 1.0
    assert short.cosine < 0.95


def test_one_activation_is_too_few(sae: SAE) -> None:
    with pytest.raises(ValueError, match="got 1"):
        reconstruction_of(sae, torch.zeros(1, sae.config.d_model))
