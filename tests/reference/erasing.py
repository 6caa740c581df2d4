"""The paper's method from prompts to decision and edit, on activations and sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from itd import SAE, HookPoint
from reference.eraser import keep_begin, paper_edit
from reference.features import select_by_sets
from reference.gate import paper_score


def states_of(pipe: Any, site: HookPoint, text: str) -> tuple[Tensor, int]:
    """Return the activations of a prompt (tokens, d_model) and the position of its end token."""
    ids = pipe.tokenizer([text], padding="max_length", truncation=True, return_tensors="pt").input_ids
    layer = int(site.path.rsplit(".", 1)[1])
    states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[layer + 1][0]
    return states, ids[0].tolist().index(pipe.tokenizer.eos_token_id)


def content_of(pipe: Any, site: HookPoint, text: str) -> Tensor:
    states, end = states_of(pipe, site, text)
    return states[1:end]


@dataclass
class PaperEraser:
    """Tian et al. 2025, section 4: features by set difference, threshold 0.99 x the smallest score of a target prompt."""

    pipe: Any
    sae: SAE
    site: HookPoint
    strength: float
    features: set[int]
    threshold: float

    @classmethod
    def make(cls, pipe: Any, sae: SAE, site: HookPoint, prompts: list[list[str]], k_sel: int, strength: float) -> PaperEraser:
        """Make it from the prompts of the target, of what stays, and of the target again for the threshold."""
        contents = [[content_of(pipe, site, text) for text in texts] for texts in prompts]
        features = select_by_sets(sae, contents[0], contents[1], k_sel)
        scores = [paper_score(sae, features, x, strength) for x in contents[2]]
        return cls(pipe, sae, site, strength, features, 0.99 * min(scores))

    def score(self, text: str) -> float:
        return paper_score(self.sae, self.features, content_of(self.pipe, self.site, text), self.strength)

    def states(self, text: str) -> Tensor:
        """Return the activations that go on to the next layer."""
        x, _ = states_of(self.pipe, self.site, text)
        return keep_begin(paper_edit(self.sae, self.features, x, self.strength), x) if self.score(text) >= self.threshold else x
