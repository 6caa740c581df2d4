"""The draft gate: the first guess of the picture, and that it is enforced as the other gates are."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import SITE, assert_check_says_what_is_enforced, make_eraser, make_sae, prompts_of, telling_apart
from torch import Tensor

from itd import EraseConfig, Eraser, HookPoint, erase
from itd.attacks.diffusion import encode
from itd.drafts import GRID, DraftGate, draft, drafts_of, towards
from itd.erasing import SALADS_EACH
from itd.pipelines import pooled_embeddings, tokenize
from itd.pooled import PooledGate

ANCHOR = "a cup"
MEANT, OTHERS = "a big red lamp", ["a photo of a dog", "my horse at night", "", "one tree in the park"]
"""The eraser under test has features of `house` only: its first gate does not fire on any of these."""
OTHER_NOUNS = prompts_of("dog", "horse", "house", "tree")


def with_gate(pipe: Any, eraser: Eraser) -> Eraser:
    """Give an eraser a draft gate that tells `MEANT` from the other prompts."""
    origin, *drafts = drafts_of(pipe, ["", MEANT, *OTHERS, ANCHOR])
    widths = DraftGate.widths_of(pipe)
    vectors = towards(torch.stack(drafts), origin, widths)
    return replace(eraser, draft=DraftGate(("lamp",), *telling_apart(vectors), ANCHOR, origin=origin, widths=widths))


def states_of(pipe: Any, prompts: list[str], n_images: int = 1) -> Tensor:
    return pipe.encode_prompt(prompts, "cpu", n_images, False)[0]


@pytest.fixture
def guarded(pipe, eraser) -> Eraser:
    assert not any(check.fired for check in eraser.check(pipe, [MEANT, *OTHERS]))
    return with_gate(pipe, eraser)


# The guess


class StubUNet(torch.nn.Module):
    """Says twice the noise plus the first value of the text states; its middle block has that value, times 7."""

    config = SimpleNamespace(in_channels=1, sample_size=2)

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = torch.nn.Upsample(scale_factor=4)

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Any:
        assert int(t) == 9
        first = encoder_hidden_states[:, :1, :1, None]
        self.mid_block(7 * first)
        return SimpleNamespace(sample=2 * x + first)


@pytest.mark.parametrize(
    ("kind", "of_noise", "of_text"),
    [("v_prediction", 0.6 - 0.8 * 2, -0.8), ("epsilon", 1 - 0.8 * 2, -0.8), ("sample", 2.0, 1.0)],
)
def test_the_guess_is_the_formula_by_hand(kind, of_noise, of_text):
    config = SimpleNamespace(prediction_type=kind, num_train_timesteps=10)
    alphas = torch.full((10,), 0.36)  # sqrt 0.6; one minus it has the root 0.8
    pipe = SimpleNamespace(unet=StubUNet(), scheduler=SimpleNamespace(config=config, alphas_cumprod=alphas))
    noise = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0)).flatten(1)
    states = torch.tensor([[[0.0]], [[5.0]]])
    guess = of_noise * noise + of_text * states[:, 0]
    torch.testing.assert_close(draft(pipe, states), torch.cat([guess, 7 * states[:, 0].expand(-1, GRID**2)], 1))


def test_an_unknown_prediction_is_refused():
    config = SimpleNamespace(prediction_type="flow", num_train_timesteps=10)
    pipe = SimpleNamespace(unet=StubUNet(), scheduler=SimpleNamespace(config=config, alphas_cumprod=torch.ones(10)))
    with pytest.raises(ValueError, match="scheduler has 'flow'"):
        draft(pipe, torch.zeros(1, 1, 1))


def test_large_guesses_are_averaged_over_squares(pipe, monkeypatch):
    channels, size = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    n_guess = channels * size**2
    whole, middle = drafts_of(pipe, [MEANT])[0].split([n_guess, DraftGate.widths_of(pipe)[1]])
    monkeypatch.setattr("itd.drafts.MOST_VALUES", channels * (size // 2) ** 2)
    image = whole.reshape(channels, size, size)
    halves = image.unfold(1, 2, 2).unfold(2, 2, 2).mean((3, 4)).flatten()
    torch.testing.assert_close(drafts_of(pipe, [MEANT])[0], torch.cat([halves, middle]))
    assert DraftGate.widths_of(pipe) == (len(halves), len(middle))


def test_how_far_a_draft_is_from_the_empty_prompts_does_not_count():
    origin = torch.tensor([1.0, 2.0])
    gate = DraftGate(("lamp",), torch.tensor([[1.0, 0.0]]), torch.tensor([0.5]), ANCHOR, origin=origin)
    drafts = origin + torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(gate.scores(drafts), torch.tensor([[1.1], [1.1], [0.5]]))


def test_the_guess_and_the_middle_block_count_each_by_its_own_direction():
    origin, directions = torch.ones(4), torch.tensor([[1.0, 0.0, 0.0, 10.0]])
    gate = DraftGate(("lamp",), directions, torch.zeros(1), ANCHOR, origin=origin, widths=(2, 2))
    drafts = origin + torch.tensor([[3.0, 4.0, 300.0, 400.0], [0.3, 0.4, 0.0, 0.0]])
    torch.testing.assert_close(gate.scores(drafts), torch.tensor([[8.6], [0.6]]))


def test_what_rounding_leaves_of_a_difference_has_no_direction():
    origin = torch.tensor([30.0, 40.0])
    drafts = origin + torch.tensor([[0.01, 0.0], [0.0, 0.5]])
    torch.testing.assert_close(towards(drafts, origin), torch.tensor([[0.0, 0.0], [0.0, 1.0]]))


def test_a_gate_of_an_earlier_version_reads_the_guess_alone(pipe, eraser):
    """Its decisions stay what they were, and it is still told from a gate of another image model."""
    n_guess = DraftGate.widths_of(pipe)[0]
    origin, *drafts = drafts_of(pipe, ["", MEANT, *OTHERS])[:, :n_guess]
    older = DraftGate(("lamp",), *telling_apart(towards(torch.stack(drafts), origin)), ANCHOR, origin=origin)
    checks = replace(eraser, draft=older).check(pipe, [MEANT, *OTHERS])
    assert [check.fired for check in checks] == [True] + [False] * len(OTHERS)
    newer = with_gate(pipe, eraser).draft
    assert newer is not None
    with pytest.raises(ValueError, match="make the older eraser again"):
        _ = older | newer


def test_a_gate_is_kept_with_the_widths_of_its_parts(pipe, guarded, saved_sae, tmp_path):
    replace(guarded, sae=saved_sae).save(tmp_path)
    loaded = Eraser.load(tmp_path, saved_sae)
    assert loaded.draft is not None
    assert loaded.draft.widths == DraftGate.widths_of(pipe)
    drafts = drafts_of(pipe, [MEANT, *OTHERS])
    torch.testing.assert_close(loaded.draft.scores(drafts), guarded.draft.scores(drafts))


# Enforcement


def test_a_prompt_that_would_draw_the_concept_gets_the_anchors_states_and_the_others_keep_their_bits(pipe, guarded):
    prompts = [OTHERS[0], MEANT, *OTHERS[1:]]
    plain, anchor = states_of(pipe, prompts, 2), states_of(pipe, [ANCHOR])
    with guarded.attach(pipe) as attached:
        erased, decisions = states_of(pipe, prompts, 2), attached.decisions
        assert (attached.n_prompts, attached.n_fired) == (len(prompts), 1)
    assert [decision.fired for decision in decisions] == [prompt == MEANT for prompt in prompts]
    assert decisions[1].concepts == ()
    assert decisions[1].meaning is not None
    assert (decisions[1].meaning.concepts, decisions[1].meaning.by) == (("lamp",), "draft")
    torch.testing.assert_close(erased[2:4], anchor.expand(2, -1, -1))
    kept = [i for i in range(2 * len(prompts)) if i not in (2, 3)]
    assert torch.equal(erased[kept], plain[kept])
    assert torch.equal(states_of(pipe, prompts, 2), plain)


def test_pictures_behind_the_draft_gate_are_the_anchors_and_the_others_keep_their_bits(pipe, guarded):
    options = {"num_inference_steps": 2, "output_type": "pt", "height": 16, "width": 16}
    wanted = [pipe([p], generator=torch.Generator().manual_seed(0), **options).images for p in (ANCHOR, OTHERS[0])]
    with guarded.attach(pipe):
        found = [pipe([p], generator=torch.Generator().manual_seed(0), **options).images for p in (MEANT, OTHERS[0])]
    torch.testing.assert_close(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def test_negative_prompts_are_not_drafted(pipe, guarded):
    plain = pipe.encode_prompt(OTHERS[:1], "cpu", 1, True, negative_prompt=[MEANT])
    with guarded.attach(pipe) as attached:
        erased = pipe.encode_prompt(OTHERS[:1], "cpu", 1, True, negative_prompt=[MEANT])
    assert all(torch.equal(a, b) for a, b in zip(erased, plain, strict=True))
    assert attached.n_fired == 0


def test_check_says_what_the_attached_gates_do(pipe, guarded):
    prompts = [MEANT, *OTHERS, "a house"]
    checks = assert_check_says_what_is_enforced(guarded, pipe, prompts)
    assert [check.concepts for check in checks[:-1]] == [("lamp",), *[()] * len(OTHERS)]


def test_both_gates_on_the_whole_prompt_are_asked(pipe, guarded):
    embeddings = pooled_embeddings(pipe, "text_encoder", [OTHERS[0], MEANT, ANCHOR])
    both = replace(guarded, pooled=PooledGate(("dog",), *telling_apart(embeddings), ANCHOR))
    prompts = [MEANT, OTHERS[0]]
    with both.attach(pipe) as attached:
        states_of(pipe, prompts)
    found = [[d.meaning.concepts for d in decided if d.meaning] for decided in (attached.decisions, both.check(pipe, prompts))]
    assert found == [[("lamp",), ("dog",)]] * 2
    assert attached.n_fired == 2


def test_the_differentiable_draft_gate_is_the_attached_one(pipe, guarded):
    prompts = [MEANT, *OTHERS]
    with guarded.attach(pipe):
        wanted = states_of(pipe, prompts)
    found = encode(pipe, tokenize(pipe, "text_encoder", prompts).input_ids, eraser=guarded)
    torch.testing.assert_close(found.states, wanted)
    assert found.margins is not None
    assert (found.margins >= 0).tolist() == [True] + [False] * len(OTHERS)


def test_an_attacker_gets_a_gradient_through_the_draft(pipe, guarded):
    input_ids = tokenize(pipe, "text_encoder", [MEANT]).input_ids
    embeddings = pipe.text_encoder.get_input_embeddings()(input_ids).detach().requires_grad_()
    margins = encode(pipe, input_ids, embeddings, guarded).margins
    assert margins is not None
    (gradient,) = torch.autograd.grad(margins.sum(), embeddings)
    assert float(gradient.abs().max()) > 0


def test_two_erasers_on_one_pipeline_do_not_see_the_anchor(pipe, guarded, boat_eraser):
    with guarded.attach(pipe) as first, boat_eraser.attach(pipe) as second:
        states_of(pipe, [MEANT, "a boat"])
    assert (first.n_prompts, second.n_prompts) == (2, 2)
    assert [decision.fired for decision in second.decisions] == [False, True]


def test_another_image_model_is_refused_and_the_pipeline_left_as_it_was(pipe, guarded):
    other = deepcopy(pipe.unet)
    with torch.no_grad():
        other.conv_out.weight.mul_(1.5)
    kept, pipe.unet = pipe.unet, other
    with pytest.raises(ValueError, match="made for another image model"):
        guarded.attach(pipe)
    with pytest.raises(ValueError, match="made for another image model"):
        guarded.check(pipe, [MEANT])
    pipe.unet = kept
    assert "encode_prompt" not in vars(pipe)
    assert guarded.check(pipe, [MEANT])[0].fired


def test_a_u_net_without_a_middle_block_is_refused(pipe, guarded):
    kept, pipe.unet.mid_block = pipe.unet.mid_block, None
    with pytest.raises(ValueError, match="a draft gate needs a U-Net with a middle block"):
        guarded.attach(pipe)
    pipe.unet.mid_block = kept


def test_pipelines_that_cannot_be_drafted_with_are_refused(xl_pipe, guarded):
    site = HookPoint("text_encoder_2", str(SITE).split(":")[1])
    eraser = replace(make_eraser(xl_pipe, make_sae(xl_pipe, site), "cat", site), draft=guarded.draft)
    with pytest.raises(ValueError, match="needs a U-Net and one text encoder, StableDiffusionXLPipeline has others"):
        eraser.attach(xl_pipe, ungated=["text_encoder"])
    assert "encode_prompt" not in vars(xl_pipe)


def test_erasers_for_two_image_models_do_not_join(guarded):
    assert guarded.draft is not None
    assert guarded.draft.origin is not None
    other = replace(guarded.draft, origin=2 * guarded.draft.origin)
    with pytest.raises(ValueError, match="draft gates join only for the same image model"):
        guarded.draft | other


def test_a_pipeline_that_cannot_be_drafted_with_is_refused_before_anything_is_encoded(xl_pipe, monkeypatch):
    monkeypatch.setattr("itd.erasing.encode_prompts", lambda *_: pytest.fail("prompts were encoded"))
    sae = make_sae(xl_pipe)
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline has others; make the eraser without draft_gate"):
        erase(xl_pipe, sae, SITE, prompts_of("cat"), OTHER_NOUNS, config=EraseConfig(draft_gate=True))


def test_the_gate_is_fitted_to_word_salads_too_and_calibrated_without_them(pipe, monkeypatch):
    asked = []
    monkeypatch.setattr("itd.erasing.drafts_of", lambda pipe, prompts: asked.append(list(prompts)) or drafts_of(pipe, prompts))
    monkeypatch.setattr("itd.erasing.MOST_SALADS", 5)
    sae, target = make_sae(pipe, SITE), prompts_of("cat")
    made = erase(pipe, sae, SITE, target, OTHER_NOUNS, config=EraseConfig(draft_gate=True))
    sentences = {*target.texts, *OTHER_NOUNS.texts}
    own, others = (prompts for prompts in asked if not sentences & {*prompts})
    parts = target.split_by_template(0)
    assert len(own) == SALADS_EACH * len(parts.of("fit"))
    assert all("cat" in prompt.split() for prompt in own)
    assert len(others) == 2 * 5
    assert not any("cat" in prompt.split() for prompt in others)
    assert sum(any(text in prompt for text in OTHER_NOUNS.texts) for prompt in others) >= 5
    assert made.records[0]["draft"]["n_positives"] == len(parts.of("calibrate"))
    monkeypatch.setattr("itd.erasing.MOST_SALADS", 40)
    more = erase(pipe, sae, SITE, target, OTHER_NOUNS, config=EraseConfig(draft_gate=True))
    assert not torch.equal(made.draft.directions, more.draft.directions)
