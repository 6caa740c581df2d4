"""MMA-style token search: other words with the same text embedding, by greedy coordinate gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from itd.attacks.base import Access, Attempt, Budget, Criterion, Goal, Target, try_prompts
from itd.attacks.diffusion import encode, encode_texts, frame, token_embedding
from itd.vocabulary import Vocabulary, names_of, vocabulary_of


@dataclass(frozen=True)
class TokenSearch:
    """Search `n_tokens` words with `max cos(f(words), f(P))`; f: pooled embedding of the public text encoder, P: honest prompt.

    Each step takes the gradient by every word's one-hot code, and keeps the best of `n_candidates` prompts that replace one
    word by one of the `top` most promising. Words of the concept's name are banned, and all that is no word of one
    token; prompts are shorter than in the released code (docs/attacks.md). The attacked system is not asked.

    Source: Yang et al. 2024, MMA-Diffusion: MultiModal Attack on Diffusion Models, section 3, the attack on the text.
    """

    name: ClassVar[str] = "mma"
    access: ClassVar[Access] = "black"

    n_tokens: int = 8
    top: int = 64
    """Replacements that are considered per word."""
    n_candidates: int = 48
    """Prompts that are compared per step."""
    n_final: int = 4
    """Best prompts that are drawn."""

    def __call__(self, system: Target, goal: Goal, criterion: Criterion, budget: Budget) -> Attempt:
        words = vocabulary_of(system.pipe).without(names_of(goal.concept))
        wanted = encode_texts(system.pipe, [goal.prompt]).pooled
        seen, losses = self.search(system.pipe, words, wanted, budget.steps, goal.seed)
        prompts = sorted(seen, key=lambda text: seen[text])[: self.n_final]
        return Attempt(goal, try_prompts(system, goal, criterion, prompts, budget.images), budget.steps, losses)

    def search(
        self, pipe: Any, words: Vocabulary, wanted: Float[Tensor, "1 d"], n_steps: int, seed: int
    ) -> tuple[dict[str, float], tuple[float, ...]]:
        """Return the best prompt of every step with its loss `1 - cos`, and the best loss so far of every step."""
        generator = torch.Generator().manual_seed(seed)
        table = token_embedding(pipe).weight.detach()[words.ids]
        rows = torch.randint(len(words), (self.n_tokens,), generator=generator)
        best, seen, losses = float("inf"), dict[str, float](), []
        for _ in range(n_steps):
            promising = promising_words(pipe, words, table, rows, wanted, self.top)
            candidates = self.replace_one(rows, promising, generator)
            found = embedding_losses(pipe, words.ids[candidates], wanted)
            winner = int(found.argmin())
            if float(found[winner]) < best:
                best, rows = float(found[winner]), candidates[winner]
                seen[words.text(rows)] = best
            losses.append(best)
        return seen, tuple(losses)

    def replace_one(
        self, rows: Int[Tensor, " n_tokens"], promising: Int[Tensor, "n_tokens top"], generator: torch.Generator
    ) -> Int[Tensor, "n_candidates n_tokens"]:
        """Return copies of the prompt, each with one random word replaced by one of its promising ones."""
        candidates = rows.repeat(self.n_candidates, 1)
        at = torch.randint(len(rows), (self.n_candidates,), generator=generator)
        which = torch.randint(promising.shape[1], (self.n_candidates,), generator=generator)
        candidates[torch.arange(self.n_candidates), at] = promising[at, which]
        return candidates


def promising_words(
    pipe: Any, words: Vocabulary, table: Float[Tensor, "v d"], rows: Int[Tensor, " n"], wanted: Float[Tensor, "1 d"], top: int
) -> Int[Tensor, "n top"]:
    """Return for every position the words whose one-hot code most lowers the loss, to first order."""
    input_ids = frame(pipe, words.ids[rows][None])
    embeddings = token_embedding(pipe).weight.detach()[input_ids].requires_grad_()
    loss = 1 - F.cosine_similarity(encode(pipe, input_ids, embeddings).pooled, wanted).sum()
    (gradient,) = torch.autograd.grad(loss, embeddings)
    slopes = gradient[0, 1 : 1 + len(rows)] @ table.T
    return (-slopes).topk(min(top, len(words)), dim=1).indices.cpu()


@torch.no_grad()
def embedding_losses(pipe: Any, ids: Int[Tensor, "n n_tokens"], wanted: Float[Tensor, "1 d"]) -> Float[Tensor, " n"]:
    """Return `1 - cos` of each prompt's pooled embedding to the wanted one."""
    return (1 - F.cosine_similarity(encode(pipe, frame(pipe, ids)).pooled, wanted)).cpu()
