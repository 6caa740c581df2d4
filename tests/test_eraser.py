from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.eraser import keep_begin, naive_edit, replace_edit
from safetensors.torch import load_file, save_file
from torch import Tensor

from itd import SAE, ConceptFeatures, Edit, Eraser, Gate, HookPoint, SAEConfig, artifacts
from itd.eraser import EDITS, EditMode
from itd.pooled import PooledGate

SITE = HookPoint("text_encoder", "encoder.layers.1")
SAE_ = SAE.random(SAEConfig(d_model=8, n_latents=30, k=6), seed=2, hook_point=SITE)
A = ConceptFeatures("a", torch.tensor([2, 5, 11, 17]), torch.tensor([0.5, 0.1, 0.7, 0.5]), scale=2.0, offset=-0.3)
B = ConceptFeatures("b", torch.tensor([0, 5, 29]), torch.tensor([0.4, 0.3, 0.8]))
ANCHORS = torch.randn(2, 8, generator=torch.Generator().manual_seed(7))
PROBE = torch.randn(8, generator=torch.Generator().manual_seed(8))
N_TOKENS = 9


def make(
    concepts: tuple[ConceptFeatures, ...] = (A, B), thresholds: tuple[float, ...] | None = None, sae: SAE = SAE_, **changes: Any
) -> Eraser:
    gate = Gate("evidence", (1.0,) * len(concepts) if thresholds is None else thresholds)
    return replace(Eraser(sae, SITE, concepts, gate, Edit(), PROBE, ANCHORS, ({"from": concepts[0].name},)), **changes)


def batch(n: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw activations with their masks: a begin token, 0 to 7 content tokens, an end token, padding."""
    generator = torch.Generator().manual_seed(seed)
    x = 1.5 * torch.randn(n, N_TOKENS, 8, generator=generator)
    lengths = torch.randint(0, 8, (n,), generator=generator)
    lengths[0] = 0
    positions = torch.arange(N_TOKENS)
    content = (positions >= 1) & (positions <= lengths[:, None])
    return x, content, (positions >= 1).expand(n, -1)


def fired_features(eraser: Eraser, concepts: tuple[int, ...]) -> set[int]:
    return {j for c in concepts for j in eraser.concepts[c].indices.tolist()}


# Edits


@pytest.mark.parametrize("mode", ["scale", "remove", "subtract"])
@pytest.mark.parametrize("strength", [-8.0, -3.0, 0.0, 1.0, 2.5])
def test_edits_equal_those_by_loops(mode: EditMode, strength: float) -> None:
    eraser, (x, content, editable) = make().with_edit(mode, strength), batch()
    erased = eraser(x, content, editable)
    for row, decision in enumerate(erased.decisions):
        expected = x[row]
        if decision.fired:
            features = fired_features(eraser, decision.concepts)
            expected = keep_begin(naive_edit(SAE_, mode, features, x[row], strength), x[row])
        torch.testing.assert_close(erased.x[row], expected, rtol=1e-4, atol=1e-4)
    assert {decision.concepts for decision in erased.decisions} >= {(), (0,), (1,), (0, 1)}


@pytest.mark.parametrize("mode", ["replace", "refuse"])
def test_anchors_are_put_at_the_tokens_that_name_the_concept_and_behind_the_prompt(mode: EditMode) -> None:
    eraser, (x, content, editable) = make().with_edit(mode, -3.0), batch()
    erased = eraser(x, content, editable)
    for row, decision in enumerate(erased.decisions):
        if decision.fired:
            positions = content[row].nonzero().flatten().tolist()
            names_it = [
                position
                for position, scores in zip(positions, decision.token_scores.tolist(), strict=True)
                if any(scores[c] >= eraser.gate.thresholds[c] for c in decision.concepts)
            ]
            features = fired_features(eraser, decision.concepts)
            edited = replace_edit(SAE_, features, x[row], -3.0, names_it, positions[-1] + 1, ANCHORS)
            torch.testing.assert_close(erased.x[row], keep_begin(edited, x[row]), rtol=1e-4, atol=1e-4)
            assert names_it
    assert any(decision.fired for decision in erased.decisions)


def test_a_strength_of_one_leaves_and_of_zero_removes() -> None:
    x, content, editable = batch()
    left = make().with_edit("subtract", 1.0)(x, content, editable).x
    removed, zero = (make().with_edit(mode, 0.0)(x, content, editable).x for mode in ("remove", "subtract"))
    torch.testing.assert_close(left, x)
    torch.testing.assert_close(removed, zero)
    assert not torch.allclose(removed, x)


def test_removed_features_write_nothing_any_more() -> None:
    """What the edit takes out is what the features of the concepts that fired wrote."""
    eraser, (x, content, editable) = make().with_edit("remove"), batch()
    erased = eraser(x, content, editable)
    row = next(row for row, decision in enumerate(erased.decisions) if decision.concepts == (1,))
    difference = x[row] - erased.x[row]
    basis = torch.linalg.qr(SAE_.W_dec[B.indices].T).Q
    torch.testing.assert_close(difference @ basis @ basis.T, difference, rtol=1e-4, atol=1e-4)
    assert difference[1:].any()


def test_tokens_without_the_features_stay_where_the_error_is_kept_and_move_where_it_is_not() -> None:
    concept = replace(A, indices=torch.tensor([2, 11]), weights=torch.tensor([0.6, 0.8]))
    x, content, editable = batch()
    kept, papers = (make((concept,), (0.5,)).with_edit(mode)(x, content, editable) for mode in ("subtract", "scale"))
    codes = SAE_.encode(x)
    silent = ~((torch.isin(codes.indices, concept.indices) & (codes.acts > 0)).any(-1))
    fired = torch.tensor([decision.fired for decision in kept.decisions])
    quiet_tokens = silent & fired[:, None] & editable
    assert quiet_tokens.any()
    assert torch.equal(kept.x[quiet_tokens], x[quiet_tokens])
    assert (papers.x[quiet_tokens] - x[quiet_tokens]).norm(dim=-1).min() > 0.01


@pytest.mark.parametrize("mode", EDITS)
def test_prompts_that_do_not_fire_keep_their_bits_and_those_that_do_change(mode: EditMode) -> None:
    x, content, editable = batch()
    before = x.clone()
    erased = make().with_edit(mode)(x, content, editable)
    fired = [decision.fired for decision in erased.decisions]
    assert any(fired)
    assert not all(fired)
    for row, hit in enumerate(fired):
        assert torch.equal(erased.x[row], before[row]) != hit
    assert torch.equal(x, before), "the input is not written to"


@pytest.mark.parametrize("mode", EDITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_begin_token_keeps_its_bits_and_the_rest_its_type(mode: EditMode, dtype: torch.dtype) -> None:
    x, content, editable = batch()
    erased = make().with_edit(mode)(x.to(dtype), content, editable)
    assert erased.x.dtype == dtype
    assert torch.equal(erased.x[:, 0], x[:, 0].to(dtype))
    assert not torch.equal(erased.x[:, 1:], x[:, 1:].to(dtype))


def test_without_a_prompt_that_fires_the_very_tensor_comes_back() -> None:
    x, content, editable = batch()
    erased = make(thresholds=(1e6, 1e6))(x, content, editable)
    assert erased.x is x
    assert not any(decision.fired for decision in erased.decisions)


@pytest.mark.parametrize("mode", EDITS)
def test_a_prompt_is_decided_and_edited_alike_alone_and_in_a_batch(mode: EditMode) -> None:
    eraser, (x, content, editable) = make().with_edit(mode), batch()
    together = eraser(x, content, editable)
    for row in range(len(x)):
        alone = eraser(x[row : row + 1], content[row : row + 1], editable[row : row + 1])
        assert alone.decisions[0].concepts == together.decisions[row].concepts
        assert alone.decisions[0].score == together.decisions[row].score
        assert torch.equal(alone.x[0], together.x[row])


def test_padding_has_no_part_in_the_decision_and_content_has() -> None:
    eraser, (x, content, editable) = make(), batch()
    plain = [decision.score for decision in eraser(x, content, editable).decisions]
    other = torch.where(content[..., None], x, 100 * torch.randn_like(x))
    assert [decision.score for decision in eraser(other, content, editable).decisions] == plain
    moved = torch.where(content[..., None], -x, x)
    assert [decision.score for decision in eraser(moved, content, editable).decisions][1:] != plain[1:]


@pytest.mark.parametrize("mode", ["scale", "remove", "subtract"])
def test_only_the_strongest_features_are_edited_where_some_are_asked_for(mode: EditMode) -> None:
    """As if the concepts had only those; the gate still decides by all."""
    x, content, editable = batch()
    few, everything = make(edit=Edit(mode, -3.0, 3)), make(edit=Edit(mode, -3.0))
    erased = few(x, content, editable)
    assert [d.concepts for d in erased.decisions] == [d.concepts for d in everything(x, content, editable).decisions]
    for row, decision in enumerate(erased.decisions):
        strongest = {
            int(index)
            for c in decision.concepts
            for index in few.concepts[c].indices[few.concepts[c].weights.argsort(descending=True)[:3]]
        }
        if strongest:
            expected = keep_begin(naive_edit(SAE_, mode, strongest, x[row], -3.0), x[row])
            torch.testing.assert_close(erased.x[row][editable[row]], expected[editable[row]], rtol=1e-4, atol=1e-4)
    assert not torch.equal(erased.x, everything(x, content, editable).x)


def test_more_features_to_edit_than_there_are_edit_all() -> None:
    x, content, editable = batch()
    assert torch.equal(make(edit=Edit(n_features=1000))(x, content, editable).x, make(edit=Edit())(x, content, editable).x)


@pytest.mark.parametrize("n", [0, -1])
def test_an_edit_of_no_feature_is_an_error(n: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1 feature of a concept, or None for all; got {n}"):
        Edit(n_features=n)


def test_padding_is_edited_with_its_prompt() -> None:
    eraser, (x, content, editable) = make().with_edit("scale"), batch()
    erased = eraser(x, content, editable)
    row = next(row for row, decision in enumerate(erased.decisions) if decision.fired and not content[row, -1])
    assert not torch.allclose(erased.x[row, -1], x[row, -1])


def test_only_the_features_of_concepts_that_fired_are_edited() -> None:
    x, content, editable = batch()
    both, alone = make(thresholds=(1e6, 1.0)), make((B,), (1.0,))
    assert torch.equal(both(x, content, editable).x, alone(x, content, editable).x)
    assert not torch.equal(make()(x, content, editable).x, alone(x, content, editable).x)


# Failing closed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 2, N_TOKENS - 1])
def test_activations_that_are_not_finite_are_an_error_at_any_position(value: float, position: int) -> None:
    x, content, editable = batch()
    x[0, position, 3] = value
    with pytest.raises(ValueError, match="NaN or infinity: the text encoder overflowed"):
        make()(x, content, editable)


def test_activations_of_another_width_are_an_error() -> None:
    x, content, editable = batch()
    with pytest.raises(ValueError, match="activations have d_model 7, this autoencoder takes 8"):
        make()(x[..., :7], content, editable)


def test_another_text_encoder_is_an_error_and_rounding_is_not() -> None:
    eraser = make()
    eraser.require_encoder(PROBE)
    eraser.require_encoder(PROBE.to(torch.bfloat16).float())
    replace(eraser, fingerprint=None).require_encoder(-PROBE)
    for other in (-PROBE, PROBE + 0.1, PROBE[:4], PROBE * float("nan"), torch.cat([PROBE, PROBE])):
        with pytest.raises(
            ValueError, match=r"made for another text encoder .*; make it again with itd\.erase on this pipeline"
        ):
            eraser.require_encoder(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": Gate("evidence", (1.0,))}, "2 concepts need as many thresholds, got 1"),
        (
            {"concepts": (A, replace(B, indices=torch.tensor([0, 5, 30])))},
            "feature 30 of 'b' is not in an autoencoder of 30 latents",
        ),
        (
            {"concepts": (A, replace(B, indices=torch.tensor([-1, 5, 9])))},
            "feature -1 of 'b' is not in an autoencoder of 30 latents",
        ),
        ({"concepts": (A, replace(B, weights=B.weights * float("nan")))}, "the weights of 'b' contain NaN or infinity"),
        ({"concepts": (A, replace(B, offset=float("nan")))}, "the weights of 'b' contain NaN or infinity"),
        ({"fingerprint": torch.zeros(7)}, r"fingerprint must have the shape \(8,\), got \(7,\)"),
        ({"anchors": torch.zeros(3, 8)}, r"anchors must have the shape \(2, 8\), got \(3, 8\)"),
        ({"edit": Edit("replace"), "anchors": None}, r"'replace' needs anchors; make the eraser with itd\.erase"),
        ({"edit": Edit("refuse"), "anchors": None}, r"'refuse' needs anchors; make the eraser with itd\.erase"),
    ],
)
def test_an_eraser_that_could_not_work_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_an_eraser_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="an eraser needs at least one concept"):
        Eraser(SAE_, SITE, (), Gate("evidence", ()))


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_an_error(strength: float) -> None:
    with pytest.raises(ValueError, match="strength must be a finite number"):
        Edit(strength=strength)


def test_an_unknown_edit_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"edit must be one of \('scale', .*, got 'typo'"):
        make().with_edit("typo")  # type: ignore[arg-type]


# Union


def same_eraser(a: Eraser, b: Eraser) -> bool:
    same = len(a.concepts) == len(b.concepts) and all(x.equals(y) for x, y in zip(a.concepts, b.concepts, strict=True))
    return same and (a.gate, a.edit, a.hook_point) == (b.gate, b.edit, b.hook_point)


def test_a_union_erases_what_either_erases() -> None:
    x, content, editable = batch()
    a, b = make((A,)), make((B,))
    assert torch.equal((a | b)(x, content, editable).x, make()(x, content, editable).x)
    assert (a | b).names == ("a", "b")
    assert (a | b).records == ({"from": "a"}, {"from": "b"})


def test_union_is_idempotent() -> None:
    a, b = make((A,)), make((B,))
    assert (a | a) is a
    assert same_eraser((a | b) | b, a | b)
    assert same_eraser(a | (a | b), a | b)
    assert (a | (a | b)).records == (a | b).records


def test_union_commutes_up_to_order_and_associates() -> None:
    x, content, editable = batch()
    a, b, c = make((A,)), make((B,)), make((replace(A, name="c", offset=0.2),), (0.8,))
    assert torch.equal((a | b)(x, content, editable).x, (b | a)(x, content, editable).x)
    assert set((a | b).names) == set((b | a).names)
    assert same_eraser((a | b) | c, a | (b | c))


def test_concepts_of_one_name_but_other_features_or_thresholds_are_both_kept() -> None:
    x, content, editable = batch()
    a, namesake, stricter = make((A,)), make((replace(B, name="a"),)), make((A,), (0.2,))
    assert len((a | namesake).concepts) == len((namesake | a).concepts) == 2
    assert torch.equal((a | namesake)(x, content, editable).x, (namesake | a)(x, content, editable).x)
    assert (a | stricter).gate.thresholds == (1.0, 0.2)


def test_the_union_of_a_copy_is_the_eraser_itself() -> None:
    a = make((A,))
    copy = make((replace(A, indices=A.indices.clone(), weights=A.weights.clone()),))
    assert (a | copy) is a
    gates = [PooledGate(("a",), torch.ones(1, 4), torch.tensor([offset]), "a tree") for offset in (0.0, 1.0)]
    assert (replace(a, pooled=gates[0]) | replace(copy, pooled=gates[0])).pooled is gates[0]
    joined = (replace(a, pooled=gates[0]) | replace(copy, pooled=gates[1])).pooled
    assert joined is not None
    assert joined.offsets.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sae": SAE.random(SAE_.config, seed=9)}, "only over the same autoencoder; make both with the same SAE"),
        (
            {"hook_point": HookPoint("text_encoder", "encoder.layers.2")},
            "only with the same hook_point: .*layers.1 and .*layers.2",
        ),
        ({"edit": Edit("remove")}, "only with the same edit"),
        ({"gate": Gate("contribution", (1.0,))}, "only with the same score and strength"),
        ({"fingerprint": -PROBE}, "made for another text encoder"),
    ],
)
def test_erasers_that_differ_in_more_than_concepts_do_not_join(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ = make((A,)) | make((B,), **changes)


def test_erasers_join_over_two_spellings_of_one_hook_point() -> None:
    spelled = replace(SITE, path=f"text_model.{SITE.path}")
    assert (make((A,)) | make((B,), hook_point=spelled)).names == ("a", "b")


def test_erasers_join_over_two_copies_of_one_saved_autoencoder(tmp_path: Path) -> None:
    saved = SAE_.save(tmp_path / "sae")
    joined = make((A,), sae=saved) | make((B,), sae=SAE.load(tmp_path / "sae"))
    assert joined.names == ("a", "b")


# Saving and loading


@pytest.fixture
def saved(tmp_path: Path) -> SAE:
    return SAE_.save(tmp_path / "sae")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_eraser_reads_back_and_erases_alike(saved: SAE, tmp_path: Path) -> None:
    made = make(sae=saved, thresholds=(1.0, 1 / 3), edit=Edit("replace", -2.5))
    made.save(tmp_path / "eraser")
    for loaded in (Eraser.load(tmp_path / "eraser"), Eraser.load(tmp_path / "eraser", sae=saved)):
        assert same_eraser(loaded, made)
        assert (loaded.records, loaded.names) == (made.records, made.names)
        assert loaded.fingerprint is not None
        assert torch.equal(loaded.fingerprint, PROBE)
        assert torch.equal(loaded(*batch()).x, made(*batch()).x)


def test_the_hash_is_of_all_that_decides_and_edits_and_of_nothing_else(saved: SAE, tmp_path: Path) -> None:
    eraser = make(sae=saved)
    eraser.save(tmp_path / "eraser")
    assert Eraser.load(tmp_path / "eraser", saved).sha256 == eraser.sha256
    assert replace(eraser, records=({"made": "elsewhere"},)).sha256 == eraser.sha256
    pooled = PooledGate(("a",), torch.ones(1, 4), torch.zeros(1), "a tree")
    others = [
        eraser.with_edit("remove"), replace(eraser, concepts=eraser.concepts[::-1]), replace(eraser, pooled=pooled),
        replace(eraser, pooled=replace(pooled, offsets=torch.ones(1))),
    ]  # fmt: skip
    assert len({eraser.sha256, *(other.sha256 for other in others)}) == 5


def test_an_eraser_of_an_earlier_version_edits_all_features(saved: SAE, tmp_path: Path) -> None:
    made = make(sae=saved, edit=Edit("subtract", -3.0, 2))
    made.save(tmp_path / "eraser")
    assert Eraser.load(tmp_path / "eraser").edit == made.edit
    edit_config(tmp_path / "eraser", schema_version=2, edit={"mode": "subtract", "strength": -3.0})
    assert Eraser.load(tmp_path / "eraser").edit == Edit("subtract", -3.0)


def test_an_eraser_without_fingerprint_and_anchors_reads_back(saved: SAE, tmp_path: Path) -> None:
    make(sae=saved, fingerprint=None, anchors=None, edit=Edit("remove")).save(tmp_path / "eraser")
    loaded = Eraser.load(tmp_path / "eraser")
    assert loaded.fingerprint is None
    assert loaded.anchors is None


def test_a_concept_without_features_reads_back(saved: SAE, tmp_path: Path) -> None:
    empty = ConceptFeatures("empty", torch.tensor([], dtype=torch.int64), torch.tensor([]))
    made = make((A, empty, B), sae=saved)
    made.save(tmp_path / "eraser")
    assert same_eraser(Eraser.load(tmp_path / "eraser"), made)


def test_an_eraser_is_small(saved: SAE, tmp_path: Path) -> None:
    make(sae=saved).save(tmp_path / "eraser")
    assert sum(path.stat().st_size for path in (tmp_path / "eraser").iterdir()) < 4000


def test_an_eraser_over_an_unsaved_autoencoder_says_how_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save the autoencoder first"):
        make().save(tmp_path / "eraser")
    assert list(tmp_path.iterdir()) == []


def test_an_eraser_for_another_autoencoder_is_an_error(saved: SAE, tmp_path: Path) -> None:
    make(sae=saved).save(tmp_path / "eraser")
    other = SAE.random(SAE_.config, seed=9)
    with pytest.raises(ValueError, match=r"made with another autoencoder .*; pass the one it was made with"):
        Eraser.load(tmp_path / "eraser", sae=other.save(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"made with another autoencoder .*given None"):
        Eraser.load(tmp_path / "eraser", sae=other)
    other.save(tmp_path / "sae")
    with pytest.raises(ValueError, match="made with another autoencoder"):
        Eraser.load(tmp_path / "eraser")


def test_an_autoencoder_that_moved_has_to_be_passed(saved: SAE, tmp_path: Path) -> None:
    make(sae=saved).save(tmp_path / "eraser")
    (tmp_path / "sae").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"is not at .*sae; pass it: Eraser\.load\(folder, sae=.*\), or --sae FOLDER"):
        Eraser.load(tmp_path / "eraser")
    assert Eraser.load(tmp_path / "eraser", sae=SAE.load(tmp_path / "moved")).names == ("a", "b")


def test_what_is_no_autoencoder_is_an_error_that_says_how_to_load_one(saved: SAE, tmp_path: Path) -> None:
    make(sae=saved).save(tmp_path / "eraser")
    with pytest.raises(ValueError, match=r"sae must be an autoencoder, got 'sae'; load it first: SAE\.load\(folder\)"):
        Eraser.load(tmp_path / "eraser", "sae")  # type: ignore[arg-type]


def test_a_folder_without_an_eraser_and_one_with_something_else_are_errors(saved: SAE, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no eraser at"):
        Eraser.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="describes a 'sae', not a 'eraser'"):
        Eraser.load(tmp_path / "sae")


GOOD = [
    {"name": "a", "n_features": 4, "scale": 2.0, "offset": -0.3},
    {"name": "b", "n_features": 3, "scale": 1.0, "offset": 0.0},
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"typo": 1}, r"config\.json: unknown keys \['typo'\]"),
        ({"sae": {"sha256": "0"}}, r"config\.json: unknown keys \[\], missing keys \['source'\]"),
        ({"concepts": [GOOD[0] | {"typo": 1}, GOOD[1]]}, r"config\.json: unknown keys \['typo'\]"),
        ({"concepts": [{"name": "a"}, GOOD[1]]}, r"missing keys \['n_features', 'offset', 'scale'\]"),
        ({"sae": {"sha256": "0", "source": None}}, "the autoencoder of .*/eraser is not at None; pass it"),
        ({"sae": 5}, r"config\.json: expected an object with the keys \['sha256', 'source'\], found 5"),
        ({"concepts": 5}, r"config\.json: expected a list of concepts, found 5; save it again"),
        ({"concepts": None}, r"config\.json: expected a list of concepts, found None"),
        ({"concepts": GOOD[:1]}, "/eraser is malformed: "),
        ({"concepts": [GOOD[0] | {"n_features": 5}, GOOD[1]]}, "/eraser is malformed: "),
        ({"concepts": [GOOD[0] | {"n_features": "4"}, GOOD[1]]}, "/eraser is malformed: "),
        ({"concepts": []}, "/eraser is malformed: "),
        ({"gate": {"score": "typo", "thresholds": [1, 1], "strength": -8}}, r"/eraser is malformed: score must be one of"),
        (
            {"gate": {"score": "evidence", "thresholds": [1], "strength": -8}},
            "/eraser is malformed: 2 concepts need as many thresholds",
        ),
        ({"gate": {"score": "evidence", "thresholds": [1, float("nan")], "strength": -8}}, "thresholds must be numbers"),
        ({"gate": {"score": "evidence", "thresholds": [1, 1], "strength": -8, "typo": 1}}, "/eraser is malformed: .*typo"),
        ({"gate": {"score": "evidence", "strength": -8}}, "/eraser is malformed: 'thresholds'"),
        ({"edit": {"mode": "typo", "strength": 1}}, "/eraser is malformed: edit must be one of"),
        ({"edit": {"mode": "scale", "typo": 1}}, "/eraser is malformed: .*typo"),
        ({"hook_point": "nowhere"}, "/eraser is malformed: a hook point is written ENCODER:PATH"),
        ({"records": None}, "/eraser is malformed: "),
    ],
)
def test_an_altered_eraser_is_an_error_that_names_its_place(
    saved: SAE, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    make(sae=saved).save(tmp_path / "eraser")
    edit_config(tmp_path / "eraser", **changes)
    with pytest.raises(ValueError, match=message):
        Eraser.load(tmp_path / "eraser")


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("indices", torch.int32, "indices is of type torch.int32, expected torch.int64"),
        ("weights", torch.int64, "weights is of type torch.int64, expected floating point"),
        ("often", torch.float32, "often is of type torch.float32, expected torch.int32"),
    ],
)
def test_tensors_of_another_type_are_an_error(saved: SAE, tmp_path: Path, name: str, dtype: torch.dtype, message: str) -> None:
    make(sae=saved, often=torch.arange(5)).save(tmp_path / "eraser")
    path = tmp_path / "eraser" / "features.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name].to(dtype)}, path)
    edit_config(tmp_path / "eraser", sha256={path.name: artifacts.sha256_of(path)})
    with pytest.raises(ValueError, match=f"/eraser is malformed: {message}; save it again"):
        Eraser.load(tmp_path / "eraser")


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_eraser_is_an_error(saved: SAE, tmp_path: Path, damage: str) -> None:
    make(sae=saved).save(tmp_path / "eraser")
    path = tmp_path / "eraser" / "features.safetensors"
    bits = path.read_bytes()
    path.write_bytes(bits[:-10] if damage == "truncated" else bits[:-1] + bytes([bits[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"features\.safetensors is truncated or altered"):
        Eraser.load(tmp_path / "eraser")


def test_a_full_disk_keeps_the_old_eraser(saved: SAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make((A,), sae=saved).save(tmp_path / "erasers" / "mine")

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        make((B,), sae=saved).save(tmp_path / "erasers" / "mine")
    assert [path.name for path in (tmp_path / "erasers").iterdir()] == ["mine"]
    assert Eraser.load(tmp_path / "erasers" / "mine").names == ("a",)
