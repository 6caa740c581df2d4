from __future__ import annotations

import pytest
import torch

from itd.metrics.alignment import clip_score, perceptual_distance


def maps(seed: int, n: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 4, 6, 6, generator=generator), torch.randn(n, 8, 3, 3, generator=generator)]


def test_the_clip_score_is_a_hundred_for_the_same_direction_and_zero_for_opposite_ones() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    text = torch.tensor([[3.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    assert clip_score(image, text).tolist() == pytest.approx([100.0, 0.0, 100 / 2**0.5], rel=1e-5)
    with pytest.raises(ValueError, match="one text per image"):
        clip_score(image, text[:2])


def test_the_perceptual_distance_is_zero_for_one_picture_and_ignores_brightness_of_features() -> None:
    a, b = maps(0), maps(1)
    assert perceptual_distance(a, a).tolist() == [0, 0, 0]
    assert perceptual_distance(a, [3 * layer for layer in a]).max() < 1e-6
    assert (perceptual_distance(a, b) > 0.5).all()
    assert torch.allclose(perceptual_distance(a, b), perceptual_distance(b, a))


def test_the_perceptual_distance_is_the_sum_over_layers_computed_place_by_place() -> None:
    a, b = maps(0, 1), maps(1, 1)
    total = 0.0
    for u, v in zip(a, b, strict=True):
        places = [(u[0, :, y, x], v[0, :, y, x]) for y in range(u.shape[2]) for x in range(u.shape[3])]
        total += sum(float((p / p.norm() - q / q.norm()).square().sum()) for p, q in places) / len(places)
    assert float(perceptual_distance(a, b)) == pytest.approx(total, rel=1e-5)


def test_other_feature_maps_are_refused() -> None:
    for other in ([], maps(0)[:1], maps(0, 2)):
        with pytest.raises(ValueError, match="same feature maps"):
            perceptual_distance(maps(0), other)
