"""Recording with a dictionary: every position of every prompt, equal ones counted."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from itd import HookPoint


def count_activations(pipe: Any, site: HookPoint, texts: list[str]) -> dict[tuple[int, ...], tuple[Tensor, int]]:
    """Return, for every distinct prefix of tokens, its activation and how often it occurs: content, end, one padding."""
    found: dict[tuple[int, ...], tuple[Tensor, int]] = {}
    layer = int(site.path.rsplit(".", 1)[1])
    for text in texts:
        ids = pipe.tokenizer([text], padding="max_length", truncation=True, return_tensors="pt").input_ids
        states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[layer + 1][0]
        row = ids[0].tolist()
        end = row.index(pipe.tokenizer.eos_token_id)
        for position in range(1, min(end + 2, len(row)) if end > 1 else 0):
            key = tuple(row[: position + 1])
            found[key] = (states[position], found.get(key, (None, 0))[1] + 1)
    return found
