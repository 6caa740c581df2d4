from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from itd.hooks import (
    Handle,
    HookPoint,
    before_forward,
    edit_output,
    find_module,
    recording,
    retuple,
    run_past,
    run_up_to,
    untuple,
)


class Layer(nn.Module):
    """A layer of either kind of release: its output is a tensor or a tuple."""

    def __init__(self, wraps: bool) -> None:
        super().__init__()
        self.wraps = wraps

    def forward(self, hidden: Tensor) -> Any:
        return (hidden + 1, "weights") if self.wraps else hidden + 1


def encoder_with_wrapper() -> nn.Module:
    """Build an encoder as releases before transformers 5.6 had it: `text_model.encoder.layers`."""
    encoder, inner, stack = nn.Module(), nn.Module(), nn.Module()
    stack.layers = nn.ModuleList([Layer(True), Layer(True)])
    inner.encoder, encoder.text_model = stack, inner
    return encoder


# Finding


@pytest.mark.parametrize("path", ["encoder.layers.1", "text_model.encoder.layers.1"])
def test_both_spellings_of_a_path_find_the_same_layer(pipe: Any, path: str) -> None:
    layers = [module for name, module in pipe.text_encoder.named_modules() if name.endswith("encoder.layers.1")]
    assert HookPoint("text_encoder", path).resolve(pipe) is layers[0]


@pytest.mark.parametrize("path", ["encoder.layers.1", "text_model.encoder.layers.1"])
def test_both_spellings_find_the_layer_of_an_encoder_with_the_wrapper(path: str) -> None:
    encoder = encoder_with_wrapper()
    assert find_module(encoder, path) is encoder.text_model.encoder.layers[1]  # type: ignore[union-attr]


def test_both_spellings_are_one_hook_point() -> None:
    site, spelled = (HookPoint("text_encoder", f"{prefix}encoder.layers.1") for prefix in ("", "text_model."))
    assert site == spelled == HookPoint.parse("text_encoder:text_model.encoder.layers.1")
    assert str(spelled) == "text_encoder:encoder.layers.1"
    assert site != HookPoint("text_encoder_2", "encoder.layers.1")


@pytest.mark.parametrize("path", ["encoder.layer.1", "encoder.layers.17", "layers.1", "encoder.block.1"])
def test_an_unknown_hook_point_lists_near_matches(pipe: Any, path: str) -> None:
    with pytest.raises(ValueError, match=rf"CLIPTextModel has no module '{path}'; near matches: .*encoder\.layers\.1"):
        HookPoint("text_encoder", path).resolve(pipe)


@pytest.mark.parametrize("path", ["", "text_model.", "zzz"])
def test_a_path_that_resembles_nothing_is_an_error_too(pipe: Any, path: str) -> None:
    with pytest.raises(ValueError, match="near matches: "):
        HookPoint("text_encoder", path).resolve(pipe)


@pytest.mark.parametrize("name", ["text_encoder_9", "tokenizer"])
def test_an_unknown_encoder_lists_the_modules_there_are(pipe: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"no encoder '{name}'; its modules are .*'text_encoder'"):
        HookPoint(name, "encoder.layers.1").resolve(pipe)


def test_a_hook_point_reads_back_what_it_writes() -> None:
    site = HookPoint("text_encoder_2", "encoder.layers.30")
    assert HookPoint.parse(str(site)) == site


@pytest.mark.parametrize("text", ["", "encoder.layers.8", ":encoder.layers.8", "text_encoder:"])
def test_a_malformed_hook_point_is_an_error_that_shows_the_form(text: str) -> None:
    with pytest.raises(ValueError, match="written ENCODER:PATH"):
        HookPoint.parse(text)


# Reading and editing


def test_tuples_and_tensors_are_unwrapped_and_wrapped_alike() -> None:
    hidden, other = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert untuple(hidden) is hidden
    assert untuple((hidden, "rest")) is hidden
    assert retuple(hidden, other) is other
    assert retuple((hidden, "rest"), other) == (other, "rest")


@pytest.mark.parametrize("output", [torch.randn(3, 4), (torch.randn(3, 4),), None, "text", {"a": 1}])
def test_an_output_that_is_not_a_residual_stream_is_an_error(output: Any) -> None:
    with pytest.raises(ValueError, match=r"must give a tensor \(batch, tokens, d_model\)"):
        untuple(output)


@pytest.mark.parametrize("wraps", [False, True])
def test_an_edit_replaces_every_row_of_the_batch_and_keeps_the_form(wraps: bool) -> None:
    layer, x = Layer(wraps), torch.randn(3, 5, 4)
    with edit_output(layer, lambda hidden: hidden * 2):
        output = layer(x)
    assert isinstance(output, tuple) == wraps
    assert torch.equal(untuple(output), (x + 1) * 2)
    assert torch.equal(untuple(layer(x)), x + 1)


@pytest.mark.parametrize("wraps", [False, True])
def test_an_edit_of_none_leaves_the_output(wraps: bool) -> None:
    layer, x = Layer(wraps), torch.randn(3, 5, 4)
    with edit_output(layer, lambda hidden: None):
        assert torch.equal(untuple(layer(x)), x + 1)


def test_hooks_that_were_there_before_see_the_edit() -> None:
    layer, x, seen = Layer(False), torch.randn(1, 2, 3), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with edit_output(layer, lambda hidden: hidden * 2):
        layer(x)
    assert torch.equal(seen[0], (x + 1) * 2)


def test_a_hook_that_is_only_appended_comes_too_late_for_them() -> None:
    layer, x, seen = Layer(False), torch.randn(1, 2, 3), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    layer(x)
    assert torch.equal(seen[0], x + 1)


def test_before_forward_sees_positional_and_keyword_arguments() -> None:
    layer, x, seen = Layer(False), torch.randn(1, 2, 3), []
    with before_forward(layer, lambda args, kwargs: seen.append((args, kwargs))):
        layer(x)
        layer(hidden=x)
    layer(x)
    assert len(seen) == 2
    assert seen[0][0][0] is x
    assert seen[1][1]["hidden"] is x


def test_recording_collects_and_changes_nothing(pipe: Any, site: HookPoint) -> None:
    ids = torch.tensor([[0, 5, 6, 7, 1]])
    plain = pipe.text_encoder(ids, output_hidden_states=True)
    with recording(site.resolve(pipe)) as outputs:
        recorded = pipe.text_encoder(ids, output_hidden_states=True)
    assert len(outputs) == 1
    assert torch.equal(outputs[0], plain.hidden_states[2])
    assert torch.equal(recorded.last_hidden_state, plain.last_hidden_state)


def test_a_run_up_to_a_layer_stops_there(pipe: Any) -> None:
    ids, layers = torch.tensor([[0, 5, 6, 7, 1]]), pipe.text_encoder.encoder.layers
    whole = pipe.text_encoder(ids, output_hidden_states=True)
    with recording(layers[2]) as later:
        hidden = run_up_to(layers[1], lambda: pipe.text_encoder(ids))
        assert later == []
        pipe.text_encoder(ids)
        assert len(later) == 1
    assert torch.equal(hidden, whole.hidden_states[2])


def test_a_run_past_a_layer_gives_its_output_and_the_result(pipe: Any) -> None:
    ids, layer = torch.tensor([[0, 5, 6, 7, 1]]), pipe.text_encoder.encoder.layers[1]
    whole = pipe.text_encoder(ids, output_hidden_states=True)
    hooks = list(layer._forward_hooks)
    result, hidden = run_past(layer, lambda: pipe.text_encoder(ids))
    assert torch.equal(hidden, whole.hidden_states[2])
    assert torch.equal(result.last_hidden_state, whole.last_hidden_state)
    assert list(layer._forward_hooks) == hooks


@pytest.mark.parametrize("run", [run_up_to, run_past])
def test_a_run_that_never_reaches_the_layer_is_an_error(run: Any) -> None:
    with pytest.raises(RuntimeError, match="never reached Layer"):
        run(Layer(False), lambda: None)


def test_an_error_inside_the_run_is_not_swallowed_and_leaves_no_hook() -> None:
    layer = Layer(False)
    with pytest.raises(KeyError):
        run_up_to(layer, lambda: {}["missing"])
    assert len(layer._forward_hooks) == 0


# Handles


def test_a_handle_undoes_in_reverse_order_and_once() -> None:
    undone: list[str] = []
    handle = Handle(lambda: undone.append("first"), lambda: undone.append("second"))
    assert handle.attached
    handle.remove()
    handle.remove()
    assert undone == ["second", "first"]
    assert not handle.attached


def test_leaving_the_block_by_an_error_removes_the_hook() -> None:
    layer, x = Layer(False), torch.randn(1, 2, 3)
    with pytest.raises(ZeroDivisionError), edit_output(layer, lambda hidden: hidden * 1 / 0):
        _ = 1 / 0
    assert torch.equal(layer(x), x + 1)
