"""Attacks as a protocol: numbers by hand, resuming, the report, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FRAMES, add_safety_checker, build_pipeline
from torch import nn
from transformers import CLIPModel, CLIPProcessor

from itd import SAE, Eraser, PromptSet, cli, emoji
from itd.attacks import ATTACKS, Budget, Direct, Goal, System, arenas, protocol
from itd.attacks.arenas import AttackConfig, benign_prompts, make_goals, run_arena, world_arena
from itd.attacks.base import Attempt, Trial
from itd.attacks.criteria import Judged
from itd.attacks.protocol import Arena, cell_of, identity_of, measures_of, names_of_attacks, run
from itd.erasing import PRESETS
from itd.evaluation.ledger import Ledger
from itd.evaluation.world import Case, Sight

OPTIONS = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 16, "width": 16}
GOALS = (Goal("house", "a photo of a {}", 0, ("tree", "lamp")), Goal("boat", "a photo of a {}", 1000))
BUDGET = Budget(images=2, steps=2)


class Erased:
    """Counts the pictures that the bare pipeline draws of the honest prompt, so that the control succeeds and erasing helps."""

    def __init__(self, pipe: Any, goal: Goal) -> None:
        self.name = f"as the bare pipeline draws {goal.concept}"
        self.wanted = System(pipe, options=OPTIONS).draw([goal.prompt], [goal.seed]).images[0]

    def __call__(self, images: torch.Tensor) -> list[bool]:
        return [bool(torch.allclose(image, self.wanted, atol=1e-5)) for image in images]


@pytest.fixture
def arena(pipe: Any, eraser: Eraser, boat_eraser: Eraser) -> Arena:
    criteria = {goal.concept: Erased(pipe, goal) for goal in GOALS}
    benign = tuple(frame.format("cat") for frame in FRAMES)
    return Arena(System(pipe, eraser | boat_eraser, OPTIONS), GOALS, criteria, benign, {"pipeline": "tiny"})


def trial(success: bool, fired: bool) -> dict[str, Any]:
    return {"prompt": "p", "seed": 0, "success": success, "fired": fired, "score": 0.0}


def test_the_four_numbers_by_hand() -> None:
    cells = {
        ("a", "erased"): [
            {"concept": "x", "success": True, "final": trial(True, False), "trials": [trial(False, True), trial(True, False)]},
            {"concept": "y", "success": True, "final": trial(True, True), "trials": [trial(True, True)]},
            {"concept": "z", "success": False, "final": trial(False, True), "trials": [trial(False, True), trial(False, True)]},
            {"concept": "w", "skipped": "no synonyms"},
        ],
        ("a", "unerased"): [{"concept": "x", "success": True, "final": trial(True, False), "trials": []}],
    }
    numbers = measures_of(cells)["a"]
    assert {name: (rate.value, rate.n) for name, rate in numbers.items()} == {
        "success_erased": (pytest.approx(2 / 3), 3),
        "evasion": (pytest.approx(1 / 3), 3),
        "success_given_flagged": (pytest.approx(1 / 4), 4),
        "success_unerased": (1.0, 1),
    }
    assert numbers["success_erased"].low < 2 / 3 < numbers["success_erased"].high


def test_the_honest_prompt_succeeds_without_the_eraser_and_not_with_it(arena: Arena, tmp_path: Path) -> None:
    """The negative control of the whole protocol."""
    report = run(arena, ["direct"], BUDGET, Ledger(tmp_path, identity_of(arena, BUDGET)))
    assert report.metrics["direct.success_unerased"] == 1
    assert report.metrics["direct.success_erased"] == 0
    assert report.metrics["direct.evasion"] == 0
    assert report.metrics["direct.success_given_flagged"] == 0
    assert report.metrics["benign_false_positives"] == 0
    assert report.metrics["chance_per_picture"] == 0


def test_every_attack_runs_and_the_record_says_how(arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "CHANCE_IMAGES", 2)
    report = run(arena, ["direct", "synonyms", "characters"], BUDGET, Ledger(tmp_path / "cells", {}))
    report.save(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    record = content["record"]
    assert record["budget"] == {"images": 2, "steps": 2}
    assert [goal["seed"] for goal in record["goals"]] == [0, 1000]
    assert set(record["attacks"]) == {"direct", "synonyms", "characters"}
    assert record["attacks"]["characters"]["most_edits"] == 2
    assert record["criteria"]["house"] == "as the bare pipeline draws house"
    assert record["eraser"]["gate"]["score"] == "evidence"
    assert record["eraser"]["sha256"] == arena.system.eraser.sha256  # type: ignore[union-attr]
    cell = record["cells"]["synonyms erased"][0]
    assert [trial["seed"] for trial in cell["trials"]] == [0, 0]
    assert "no synonyms" in record["cells"]["synonyms erased"][1]["skipped"]
    assert content["intervals"]["synonyms.success_erased"]["n"] == 1
    page, text = ((tmp_path / "out" / f"report.{ending}").read_text() for ending in ("html", "md"))
    assert "data:image/png" in page
    assert "characters" in text
    assert "synonyms" in text


def test_a_run_that_was_stopped_goes_on_where_it_was(arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool]] = []
    real = protocol.attack_goal

    def counting(arena: Arena, attack: Any, name: str, arm: Any, goal: Goal, *rest: Any) -> Any:
        calls.append((goal.concept, arm == "erased"))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(arena, attack, name, arm, goal, *rest)

    monkeypatch.setattr(protocol, "attack_goal", counting)
    with pytest.raises(KeyboardInterrupt):
        run(arena, ["direct"], BUDGET, Ledger(tmp_path, {}))
    stopped = run(arena, ["direct"], BUDGET, Ledger(tmp_path, {}))
    assert len(calls) == 5, "two cells were kept, one was interrupted, two were left"
    monkeypatch.setattr(protocol, "attack_goal", real)
    whole = run(arena, ["direct"], BUDGET, Ledger(tmp_path / "again", {}))
    assert stopped.metrics == whole.metrics
    assert stopped.record == whole.record


def test_results_of_another_system_or_budget_are_not_taken(arena: Arena, tmp_path: Path) -> None:
    Ledger(tmp_path, identity_of(arena, BUDGET))
    with pytest.raises(ValueError, match="another budget"):
        Ledger(tmp_path, identity_of(arena, Budget(3, 2)))
    eraser = arena.system.eraser
    assert eraser is not None
    for changed in (eraser.with_edit("remove"), replace(eraser, concepts=eraser.concepts[::-1])):
        other = replace(arena, system=System(arena.system.pipe, changed, OPTIONS))
        with pytest.raises(ValueError, match="another eraser_sha256"):
            Ledger(tmp_path, identity_of(other, BUDGET))


def test_an_arena_that_cannot_tell_success_is_refused(arena: Arena) -> None:
    with pytest.raises(ValueError, match="no eraser"):
        replace(arena, system=arena.system.without_eraser())
    with pytest.raises(ValueError, match="2 and 0"):
        replace(arena, benign=())
    with pytest.raises(ValueError, match=r"no criterion tells .* 'boat'"):
        replace(arena, criteria={"house": arena.criteria["house"]})


def test_what_is_kept_of_an_attempt() -> None:
    trials = (Trial("a", 1, False, True, 0.5), Trial("b", 2, True, False, 0.1), Trial("c", 3, True, False, 0.2))
    cell = cell_of(Attempt(GOALS[0], trials, 250, tuple(float(i) for i in range(250))))
    assert cell["final"] == {"prompt": "b", "seed": 2, "success": True, "fired": False, "score": 0.1}
    assert len(cell["losses"]) <= protocol.MOST_LOSSES
    assert cell["losses"][0] == 0.0


def test_prompts_that_won_are_kept_for_another_eraser(tmp_path: Path) -> None:
    won, flagged, lost = trial(True, False), trial(True, True), trial(False, False)
    cells = {
        "mma erased": [{"concept": "x", "trials": [won | {"prompt": "a"}, flagged | {"prompt": "b"}, lost | {"prompt": "c"}]}],
        "p4d erased": [
            {"concept": "y", "trials": [won | {"prompt": "a"}, won | {"prompt": "a"}]},
            {"concept": "z", "skipped": "-"},
        ],
        "mma unerased": [{"concept": "x", "trials": [won | {"prompt": "d"}]}],
        "inversion erased": [{"concept": "x", "trials": [won | {"prompt": "e"}]}],
        "inversion-aware erased": [{"concept": "x", "trials": [won | {"prompt": "f"}]}],
    }
    found = protocol.evading_prompts(cells)
    assert [(prompt.text, prompt.concept) for prompt in found] == [("a", "x"), ("a", "y")]
    found.to_jsonl(tmp_path / "evading.jsonl")
    assert PromptSet.from_jsonl(tmp_path / "evading.jsonl").concepts == ("x", "y")


def test_attacks_are_asked_for_by_name_or_group() -> None:
    assert names_of_attacks(["all"])[0] == "direct"
    assert set(names_of_attacks(["all"])) == set(ATTACKS)
    assert set(names_of_attacks(["black"])) | set(names_of_attacks(["white"])) == set(ATTACKS)
    assert names_of_attacks(["mma", "black"])[0] == "mma"
    assert len(names_of_attacks(["mma", "black"])) == len(names_of_attacks(["black"]))
    for wrong, message in ((["mna"], "got 'mna'"), ([], "name an attack")):
        with pytest.raises(ValueError, match=message):
            names_of_attacks(wrong)


# Arenas


def test_quick_is_a_stated_subsample() -> None:
    quick = AttackConfig(quick=True, images=2).stated
    assert (quick.n_concepts, quick.images, quick.steps, quick.n_benign) == (4, 2, 20, 200)
    assert AttackConfig().stated == AttackConfig()
    with pytest.raises(ValueError, match="n_concepts must be at least 1, got 0"):
        AttackConfig(n_concepts=0)


def test_goals_have_seeds_of_their_own() -> None:
    goals = make_goals(["cat", "dog"], 7, {"dog": ["puppy"]})
    assert [goal.seed for goal in goals] == [7, 1007]
    assert [goal.synonyms for goal in goals] == [(), ("puppy",)]


def test_benign_prompts_are_held_out_and_different() -> None:
    import random

    prompts = benign_prompts(["cat", "dog"], 12, random.Random(0))
    assert len(set(prompts)) == 12
    assert all("cat" in prompt or "dog" in prompt for prompt in prompts)
    assert len(benign_prompts(["cat"], 100, random.Random(0))) == 10


def test_the_world_keeps_benign_concepts_from_the_eraser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the gate is charged with on benign prompts, it has never seen."""
    from itd.evaluation import world

    made: dict[str, Any] = {}

    class FakeWorld:
        def __init__(self, out: Path, protocol: str, settings: dict[str, Any], eraser: Any = None) -> None:
            self.nouns = {noun.name: noun for noun in emoji.nouns()}
            self.pipe, self.record = object(), {}
            self.judge = type("J", (), {"nouns": list(self.nouns), "designs": []})()

        def of_role(self, *roles: str) -> list[str]:
            return [name for name, noun in self.nouns.items() if noun.role in roles]

        def best_drawn(self, names: list[str], n: int) -> list[str]:
            return sorted(names)[:n]

        def eraser(self, key: str, sets: Any, config: Any) -> Any:
            made.update(sets=sets, config=config)
            return type("M", (), {"eraser": object()})()

    asked: list[list[str]] = []
    monkeypatch.setattr(world, "World", FakeWorld)
    monkeypatch.setattr(arenas, "sure_of", lambda _, names: asked.append(names) or 0.3)
    found = world_arena(AttackConfig(n_concepts=3, n_benign=50), tmp_path)
    sets = made["sets"]
    assert [goal.concept for goal in found.goals] == sorted(sets.target.concepts)
    assert all(goal.synonyms for goal in found.goals)
    seen = set((sets.retain + sets.neutral).concepts)
    assert seen
    assert set(sets.target.concepts).isdisjoint(seen)
    assert not [prompt for prompt in found.benign if prompt in {p.text for p in sets.retain + sets.neutral}]
    held_out = set(emoji_names()) - seen - set(sets.target.concepts)
    assert all(any(name in prompt for name in held_out) for prompt in found.benign)
    assert set(asked[0]) == held_out
    assert {criterion.least for criterion in found.criteria.values() if isinstance(criterion, Judged)} == {0.3}
    assert found.record["least_sure"] == 0.3
    assert made["config"] == PRESETS["strict"]
    world_arena(AttackConfig(n_concepts=3, n_benign=50, edit="subtract", pooled_gate=False, n_features=64), tmp_path)
    assert made["config"] == replace(PRESETS["strict"], edit="subtract", pooled_gate=False, n_features=64)


def test_how_sure_the_judge_has_to_be_is_what_it_is_in_pictures_that_it_names_right() -> None:
    class FakeWorld:
        def draw(self, arm: str, cases: list[Case]) -> list[Case]:
            assert arm == "unerased"
            assert {case.noun for case in cases} == {"cat", "dog", "owl"}
            return cases

        def see(self, drawn: list[Case]) -> Sight:
            confidence = torch.tensor([0.9 if case.noun == "cat" else 0.5 for case in drawn])
            named = [case.noun if case.noun != "owl" else "wrong" for case in drawn]
            return Sight(named, [], confidence, torch.empty(0), [])

    assert arenas.sure_of(FakeWorld(), ["owl", "cat", "dog"]) == pytest.approx(0.5 + 0.05 * 0.4)


def emoji_names() -> list[str]:
    return [noun.name for noun in emoji.nouns()]


def test_only_what_the_eraser_erases_is_attacked(eraser: Eraser) -> None:
    assert arenas.goals_of(eraser, []) == list(eraser.names)
    assert arenas.goals_of(eraser, [eraser.names[0]]) == [eraser.names[0]]
    with pytest.raises(ValueError, match="the eraser does not erase 'owl'"):
        arenas.goals_of(eraser, [eraser.names[0], "owl"])


def test_a_word_for_what_is_not_attacked_is_an_error() -> None:
    words = PromptSet.from_rows([{"prompt": "kitty", "concept": "dog"}])
    with pytest.raises(ValueError, match=r"'kitty' is a word for 'dog', which is not attacked; .* has to name one of cat"):
        arenas.with_words(make_goals(["cat"], 0), words)


def test_a_model_of_ones_own_needs_a_judge_and_benign_prompts(tmp_path: Path, pipe: Any, eraser: Eraser) -> None:
    with pytest.raises(ValueError, match="--clip"):
        arenas.model_arena(AttackConfig(), pipe, eraser, None, [], ["cat"], None, {})


def test_a_model_is_attacked_without_its_safety_checker(
    tmp_path: Path, pipe: Any, eraser: Eraser, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in (CLIPModel, CLIPProcessor):
        monkeypatch.setattr(part, "from_pretrained", lambda *_, **__: nn.Identity())
    (tmp_path / "benign.txt").write_text("a photo of a cat\n")
    checked = add_safety_checker(pipe)
    arena = arenas.model_arena(AttackConfig(), checked, eraser, tmp_path, [], ["cat"], tmp_path / "benign.txt", {})
    assert checked.safety_checker is None
    assert arena.record["safety_checker"] == "off"


def test_the_command_attacks_a_model_and_goes_on(
    tokenizer: Any, saved_sae: SAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny import make_eraser

    pipe = build_pipeline(tokenizer)
    pipe.save_pretrained(tmp_path / "model")
    make_eraser(pipe, saved_sae, "house").save(tmp_path / "eraser")
    (tmp_path / "benign.txt").write_text("a photo of a cat\na big red dog\n")
    given: dict[str, Any] = {}

    def own_arena(config: Any, pipe: Any, eraser: Any, clip: Any, names: Any, others: Any, benign: Any, options: Any) -> Arena:
        given.update(clip=clip, others=others, options=options)
        goals = make_goals(list(names) or eraser.names, config.seed)
        prompts = tuple(PromptSet.from_file(benign).texts)
        return Arena(System(pipe, eraser, OPTIONS), goals, {"house": Erased(pipe, goals[0])}, prompts)

    monkeypatch.setattr(arenas, "model_arena", own_arena)
    out = tmp_path / "out"
    argv = ["attack", "direct", "--model", str(tmp_path / "model"), "--eraser", str(tmp_path / "eraser"), "--out", str(out)]
    argv += [
        "--others",
        "cat",
        "dog",
        "--clip",
        "c",
        "--benign",
        str(tmp_path / "benign.txt"),
        "--images",
        "2",
        "--inference-steps",
        "2",
    ]
    assert cli.main(argv) == 0
    first = capsys.readouterr().out
    assert "direct.success_unerased" in first
    assert f"page: {out / 'report.html'}" in first
    assert given == {"clip": Path("c"), "others": ["cat", "dog"], "options": {"num_inference_steps": 2}}
    assert json.loads((out / "report.json").read_text())["metrics"]["direct.success_erased"] == 0
    monkeypatch.setattr(Direct, "__call__", lambda *_: pytest.fail("computed again"))
    assert cli.main(["attack", "--config", str(out / "config.json")]) == 0
    assert capsys.readouterr().out == first
    (tmp_path / "words.csv").write_text("prompt,concept\ncottage,house\n")
    argv[1], argv[argv.index(str(out))] = "synonyms", str(tmp_path / "words")
    assert cli.main([*argv, "--words", str(tmp_path / "words.csv")]) == 0
    cells = json.loads((tmp_path / "words" / "report.json").read_text())["record"]["cells"]
    trials = [trial for cell in cells["synonyms erased"] for trial in cell["trials"]]
    assert trials
    assert all("cottage" in trial["prompt"] for trial in trials)


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["attack", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "usage: itd attack" in out
    for flag in ("--images", "--steps", "--quick", "--no-control", "--benign", "--n-concepts", "--seed"):
        assert flag in out


def test_the_command_names_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["attack", "mna", "--out", str(tmp_path / "out")]) == 2
    assert "got 'mna'" in capsys.readouterr().err
    assert cli.main(["attack", "--model", "somewhere", "--out", str(tmp_path / "out")]) == 2
    assert "--eraser is required" in capsys.readouterr().err
    assert cli.main(["attack", "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    assert "--device cuda" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_run_arena_refuses_a_folder_of_other_settings(arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "world_arena", lambda *_: arena)
    run_arena(AttackConfig(images=1, steps=1), tmp_path, ["direct"], ("erased",))
    with pytest.raises(ValueError, match="another budget"):
        run_arena(AttackConfig(images=2, steps=1), tmp_path, ["direct"], ("erased",))
