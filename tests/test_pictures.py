"""The picture gate: what the image model sees in a finished picture, and that nothing leaves the decoder unseen."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SITE, make_sae, prompts_of, telling_apart
from torch import Tensor

from itd import EraseConfig, Eraser, Retained, add_concepts, erase
from itd.attacks.base import System
from itd.attacks.diffusion import guess, noised, predict
from itd.attacks.objectives import Denoise, Loss, Noise
from itd.drafts import fixed_noise, states_of, towards
from itd.erasing import LOOKED
from itd.pictures import BLACK, NOISED, PictureGate, drawn_features, picture_features
from itd.sae import SAE

OPTIONS: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16}
SHOWN, OTHERS = "a big red lamp", ["a photo of a dog", "my horse at night", "one tree in the park"]
"""The eraser under test has features of `house` only: its first gate fires on none of these."""
OTHER_NOUNS = prompts_of("dog", "horse", "house", "tree")
MADE = EraseConfig(picture_gate=True, picture_steps=2)


def draw(pipe: Any, prompts: list[str], output: str = "pt") -> Tensor:
    """Draw each prompt from the seed 0."""
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    return pipe(prompts, generator=generators, output_type=output, **OPTIONS).images


def gate_for(pipe: Any, name: str, prompts: list[str]) -> PictureGate:
    """Return a gate that tells the picture of the first prompt from those of the others."""
    origin = PictureGate.origin_of(pipe)
    features = towards(picture_features(pipe, draw(pipe, prompts, "latent")), origin)
    return PictureGate((name,), *telling_apart(features), "a cup", origin=origin)


@pytest.fixture
def guarded(pipe: Any, eraser: Eraser) -> Eraser:
    assert not any(check.fired for check in eraser.check(pipe, [SHOWN, *OTHERS]))
    return replace(eraser, picture=gate_for(pipe, "lamp", [SHOWN, *OTHERS]))


# What is seen


@torch.no_grad()
def test_the_features_are_those_of_the_middle_block_on_the_noised_picture(pipe: Any) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    hook = pipe.unet.mid_block.register_forward_hook(lambda _m, _i, output: seen.append(output))
    states = states_of(pipe, ["", ""])
    for share in NOISED:
        t = int(share * pipe.scheduler.config.num_train_timesteps)
        alpha = pipe.scheduler.alphas_cumprod[t]
        given = alpha.sqrt() * latents + (1 - alpha).sqrt() * fixed_noise((1, 4, 8, 8))
        pipe.unet(given, torch.tensor(t), encoder_hidden_states=states)
    hook.remove()
    side = seen[0].shape[-1] // 2
    wanted = [x.unfold(2, side, side).unfold(3, side, side).mean((4, 5)).flatten(1) for x in seen]
    torch.testing.assert_close(picture_features(pipe, latents), torch.cat(wanted, 1))


def test_features_that_threads_read_at_once_are_those_read_alone(pipe: Any) -> None:
    latents = torch.randn(6, 1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    alone = [picture_features(pipe, picture) for picture in latents]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda picture: picture_features(pipe, picture), [*latents] * 4))
    for i, features in enumerate(together):
        torch.testing.assert_close(features, alone[i % 6])


def test_drawn_features_are_those_of_the_pipelines_pictures(pipe: Any) -> None:
    found = drawn_features(pipe, ["a dog", "a tree"], 2, 7.5, seed=3)
    latents = [
        pipe([prompt], num_inference_steps=2, generator=torch.Generator().manual_seed(3 + i), output_type="latent").images
        for i, prompt in enumerate(["a dog", "a tree"])
    ]
    torch.testing.assert_close(found, torch.cat([picture_features(pipe, x) for x in latents]), atol=1e-4, rtol=1e-4)


# Enforcement


def test_a_picture_that_shows_the_concept_is_black_and_the_others_keep_their_bits(pipe: Any, guarded: Eraser) -> None:
    prompts = [OTHERS[0], SHOWN, *OTHERS[1:]]
    plain = draw(pipe, prompts)
    with guarded.attach(pipe) as attached:
        found, decisions = draw(pipe, prompts), attached.decisions
        assert (attached.n_pictures, attached.n_hidden, attached.n_fired) == (4, 1, 0)
    assert float(found[1].abs().max()) == 0
    assert torch.equal(found[[0, 2, 3]], plain[[0, 2, 3]])
    assert [decision.fired for decision in decisions] == [False, True, False, False]
    meaning = decisions[1].meaning
    assert meaning is not None
    assert (meaning.concepts, meaning.by) == (("lamp",), "picture")
    assert torch.equal(draw(pipe, prompts), plain)
    assert "decode" not in vars(pipe.vae)


def test_each_prompt_is_decided_by_all_of_its_pictures(pipe: Any, guarded: Eraser) -> None:
    with guarded.attach(pipe) as attached:
        pipe([OTHERS[0], SHOWN], num_images_per_prompt=2, output_type="pt", **OPTIONS)
        assert attached.n_pictures == 4
        assert len(attached.decisions) == 2
        assert all(decision.meaning is not None for decision in attached.decisions)


@pytest.mark.parametrize("as_tuple", [True, False])
def test_latents_that_are_decoded_by_hand_are_looked_at_too(pipe: Any, guarded: Eraser, as_tuple: bool) -> None:
    latents = draw(pipe, [SHOWN, OTHERS[0]], "latent") / pipe.vae.config.scaling_factor
    plain = pipe.vae.decode(latents).sample
    with guarded.attach(pipe):
        result = pipe.vae.decode(latents, return_dict=not as_tuple)
    found = result[0] if as_tuple else result.sample
    assert (found[0] == BLACK).all()
    assert torch.equal(found[1], plain[1])


def test_the_gate_stays_until_the_last_eraser_with_one_is_removed(pipe: Any, guarded: Eraser, boat_eraser: Eraser) -> None:
    first, second, third = guarded.attach(pipe), boat_eraser.attach(pipe), guarded.attach(pipe)
    first.remove()
    assert float(draw(pipe, [SHOWN]).abs().max()) == 0
    third.remove()
    assert "decode" not in vars(pipe.vae)
    assert float(draw(pipe, [SHOWN]).abs().max()) > 0
    second.remove()


def test_another_decoder_or_image_model_is_refused(pipe: Any, guarded: Eraser) -> None:
    with guarded.attach(pipe):
        kept, pipe.vae = pipe.vae, deepcopy(pipe.vae)
        with pytest.raises(RuntimeError, match="the vae was replaced"):
            draw(pipe, [OTHERS[0]])
        pipe.vae = kept
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(3)
    with pytest.raises(ValueError, match="the picture gate was made for another image model"):
        guarded.attach(pipe)
    with torch.no_grad():
        pipe.unet.conv_in.weight.div_(3)
    assert "encode_prompt" not in vars(pipe)


def test_a_check_says_nothing_of_pictures(pipe: Any, guarded: Eraser) -> None:
    assert [check.meaning for check in guarded.check(pipe, [SHOWN])] == [None]


# Making, keeping, joining


def test_erase_draws_for_the_gate_records_what_it_does_and_keeps_it(pipe: Any, tmp_path: Path, saved_sae: SAE) -> None:
    made = erase(pipe, saved_sae, SITE, prompts_of("cat"), OTHER_NOUNS, config=MADE)
    assert made.picture is not None
    assert made.picture.names == ("cat",)
    assert made.records[0]["picture"]["threshold"] == PictureGate.part_way
    made.save(tmp_path)
    loaded = Eraser.load(tmp_path, saved_sae)
    assert loaded.picture is not None
    assert torch.equal(loaded.picture.directions, made.picture.directions)
    loaded.picture.require_image_model(pipe)
    assert loaded.picture.origin is not None
    other = replace(loaded.picture, origin=2 * loaded.picture.origin)
    with pytest.raises(ValueError, match="picture gates join only for the same image model"):
        made.picture | other
    with pytest.raises(ValueError, match="an eraser with a picture gate joins only another with one"):
        made | replace(made, picture=None)


def test_a_gate_that_was_saved_with_another_threshold_decides_as_it_did(
    pipe: Any, tmp_path: Path, saved_sae: SAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = erase(pipe, saved_sae, SITE, prompts_of("cat"), OTHER_NOUNS, config=MADE)
    made.save(tmp_path)
    monkeypatch.setattr(PictureGate, "part_way", PictureGate.part_way + 0.3)
    loaded = Eraser.load(tmp_path, saved_sae)
    assert made.picture is not None
    assert loaded.picture is not None
    torch.testing.assert_close(loaded.picture.offsets, made.picture.offsets + 0.3)


def test_an_added_concept_gets_its_direction(pipe: Any, sae: SAE) -> None:
    kept = Retained.make(pipe, sae, SITE, OTHER_NOUNS)
    made = erase(pipe, sae, SITE, prompts_of("cat"), kept, config=MADE)
    more = add_concepts(made, pipe, prompts_of("boat"), kept)
    assert more.picture is not None
    assert more.picture.names == ("cat", "boat")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], float | None]]:
    """Prompts that are drawn for the gate, and their guidance."""
    seen: list[tuple[list[str], float | None]] = []

    def record(pipe: Any, prompts: Any, steps: int | None, guidance: float | None, seed: int) -> Tensor:
        seen.append((list(prompts), guidance))
        return drawn_features(pipe, prompts, steps, guidance, seed)

    monkeypatch.setattr("itd.erasing.drawn_features", record)
    return seen


def test_pictures_of_a_concept_are_drawn_without_guidance_too(pipe: Any, sae: SAE, asked: list[Any]) -> None:
    erase(pipe, sae, SITE, prompts_of("cat"), OTHER_NOUNS, config=replace(MADE, picture_guidance=4.0))
    unguided = [texts for texts, guidance in asked if guidance == 1.0]
    assert unguided == [texts for texts, guidance in asked[:1] if guidance == 4.0], "those that it is fitted on, not calibrated"
    assert len(asked) == 5, "fitted on and calibrated on, of the concept and of others, and the further ones"


def test_pictures_are_drawn_in_further_looks_too(pipe: Any, sae: SAE, asked: list[Any]) -> None:
    looks = "in oil", "in pencil"
    erase(pipe, sae, SITE, prompts_of("cat"), OTHER_NOUNS, config=replace(MADE, picture_looks=looks))
    (own, _), _, (others, _), (held_out, _), _, (looked, _) = asked
    assert looked == [f"{text}, {looks[i % 2]}" for i, text in enumerate(own)]
    assert [i for i, text in enumerate(others) if text.endswith(looks)] == list(range(0, len(others), LOOKED))
    assert not any(text.endswith(looks) for text in (*own, *held_out))


def test_looks_that_are_no_phrases_are_refused() -> None:
    with pytest.raises(ValueError, match="picture_looks must be phrases, each of some words, got 'in oil'"):
        EraseConfig(picture_looks="in oil")  # type: ignore[arg-type]
    assert EraseConfig(picture_looks=["in oil"]) == EraseConfig(picture_looks=("in oil",))  # type: ignore[arg-type]


def test_a_pipeline_whose_pictures_cannot_be_read_is_refused_before_anything_is_drawn(xl_pipe: Any) -> None:
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline has others; make the eraser without picture_gate"):
        erase(xl_pipe, make_sae(xl_pipe), SITE, prompts_of("cat"), OTHER_NOUNS, config=MADE)


# Attackers who know it


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_guess_undoes_the_noise(pipe: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pipe.scheduler.config, "prediction_type", kind)
    x0, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([100, 400])
    x_t, said = noised(pipe, x0, noise, t)
    torch.testing.assert_close(guess(pipe, x_t, said, t), x0, atol=1e-4, rtol=1e-4)


def test_an_attacker_who_knows_the_gate_pays_for_pictures_that_show_the_concept(pipe: Any, guarded: Eraser) -> None:
    t = torch.tensor([300])
    x_t, wanted = noised(pipe, draw(pipe, [SHOWN], "latent"), fixed_noise((1, 4, 8, 8)), t)
    noise, states = Noise(x_t, wanted, t), states_of(pipe, [SHOWN]).detach().requires_grad_()
    blind, aware = (Loss(System(pipe, guarded), Denoise(pipe), weight, slack=50.0) for weight in (0.0, 2.0))
    assert float(blind.picture_penalty(states, noise)) == 0
    paid = aware.picture_penalty(states, noise)
    assert guarded.picture is not None
    features = picture_features(pipe, guess(pipe, x_t, predict(pipe, x_t, t, states), t))
    margin = guarded.picture.scores(features).amax() - guarded.picture.part_way
    assert float(paid.detach()) > 0
    torch.testing.assert_close(paid, 2 * (margin + aware.slack))
    (gradient,) = torch.autograd.grad(paid, states)
    assert float(gradient.abs().max()) > 0
