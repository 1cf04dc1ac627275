"""The model card of an export: the README.md that hubs show, written from what the run recorded.

It holds no path of a machine and no secret; what others wrote (names, descriptions) is shown as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from bico_ds.common.secrets import text_without_secrets
from bico_ds.common.yaml_files import dump_yaml
from bico_ds.model.weights.blend import Blend
from bico_ds.training.export.base_papers import BasePapers
from bico_ds.training.export.facts import ExportFacts
from bico_ds.training.export.markdown import code, plain, table
from bico_ds.training.export.scores_text import scores_text
from bico_ds.training.export.training_text import shown_name, training_text

Kind = Literal["model", "adapter"]

_MODEL = """\
from transformers import pipeline

model = "."  # this folder, or its name on a hub
answer = pipeline("text-generation", model=model)
print(answer("PROMPT", max_new_tokens=32, do_sample=False, return_full_text=False)[0]["generated_text"])"""
_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "."  # this folder, or its name on a hub; adapter_config.json names the base, which must be there
model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
tokens = model.generate(**tokenizer("PROMPT", return_tensors="pt"), max_new_tokens=32, do_sample=False)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))"""
BICO_PAPER = """\
@article{lv2023analysis,
  title={An Analysis and Mitigation of the Reversal Curse},
  author={Lv, Ang and Zhang, Kaiyi and Xie, Shufang and Tu, Quan and Chen, Yuhan and Wen, Ji-Rong and Yan, Rui},
  journal={arXiv preprint arXiv:2311.07468},
  year={2023}
}"""


def card_text(
    facts: ExportFacts,
    base: BasePapers | None,
    config: Mapping[str, Any],
    *,
    kind: Kind,
    blend: Blend | None,
) -> str:
    """The whole card. `base`: None where the run began with random weights; `config`: the model's config.json."""
    name = facts.recipe.name if blend is None else f"{facts.recipe.name}, blended with its base"
    lines = ["---", dump_yaml(_head(facts, base, kind)).rstrip(), "---", "", f"# {plain(name)}", ""]
    lines += [plain(text_without_secrets(facts.recipe.description)), ""] if facts.recipe.description else []
    lines += [_what_it_is(facts, base, config, kind), ""]
    lines += [*_blend_text(blend), ""] if blend is not None else []
    lines += [*_use_text(facts, config, kind), "", *training_text(facts, base, config), ""]
    lines += [*scores_text(facts, is_blend=blend is not None), ""]
    lines += [*licence_text(facts.recipe.name, base), "", *_cite_text(base)]
    return "\n".join(lines) + "\n"


def licence_text(name: str, base: BasePapers | None) -> list[str]:
    """The section on what the base's licence asks of whoever passes on a model of this name."""
    lines = ["## Licence", ""]
    if base is None:
        return [
            *lines,
            "No base: the run began with random weights. Whoever passes the model on chooses a licence.",
        ]
    for licence in base.licences:
        lines += [
            f"The base comes under the {plain(licence.name)}. What it asks of a model made from it:",
            "",
        ]
        lines += [f"- {plain(sentence)}" for sentence in licence.conditions()]
        if not licence.allows_name(name):
            lines.append(
                f"- **This name does not keep to it:** {code(name)}. {code(licence.suggested(name))} would."
            )
        lines += ["", "This is a summary; the licence itself holds.", ""]
    if base.carried:
        lines += [f"Beside this card: {', '.join(map(code, base.carried))}.", ""]
    return [*lines, *(f"**{plain(note)}.**" for note in missing_papers(base))]


def missing_papers(base: BasePapers) -> list[str]:
    """What of the base's licence could not be had, a sentence each, without its end."""
    notes = []
    if base.folder is None:
        notes.append(
            "The base is not on the machine that wrote this export: look at its licence before you pass this on"
        )
    elif not base.has_licence_text:
        named = f" (its card names {base.licences[0].name})" if base.licences else ""
        notes.append(f"No licence was found beside the base{named}: look it up before you pass this on")
    elif not base.licences:
        notes.append(
            "The licence of the base is none that this program knows: read it before you pass this on"
        )
    return notes + [f"Not copied from the base: {refused}" for refused in base.refused]


def _head(facts: ExportFacts, base: BasePapers | None, kind: Kind) -> dict[str, Any]:
    """What hubs read: https://huggingface.co/docs/hub/model-cards. Of a local base they would not find the name."""
    head: dict[str, Any] = {}
    if base is not None and base.is_on_hub:
        head["base_model"] = base.name
        head["base_model_relation"] = "adapter" if kind == "adapter" else "finetune"
    if base is not None and len(base.licences) == 1:
        licence = base.licences[0]
        head["license"] = licence.hub_id
        if licence.hub_name is not None:
            head["license_name"] = licence.hub_name
            head["license_link"] = next(
                (name for name in base.files if name.lower().startswith("licen")), "LICENSE"
            )
    head["library_name"] = "peft" if kind == "adapter" else "transformers"
    head["pipeline_tag"] = "text-generation"
    kinds = dict.fromkeys(str(spec["kind"]) for spec in facts.objectives.values())
    head["tags"] = ["bico_ds", *kinds, *(["lora"] if facts.recipe.model.lora is not None else [])]
    return head


def _what_it_is(facts: ExportFacts, base: BasePapers | None, config: Mapping[str, Any], kind: Kind) -> str:
    version = (facts.start.get("versions") or {}).get("bico_ds", "")
    model = f"a {plain(str(config.get('model_type', 'causal')))} language model"
    what = f"LoRA adapters for {model}" if kind == "adapter" else model[0].upper() + model[1:]
    how = "trained from random weights" if base is None else f"fine-tuned from {shown_name(base)}"
    dtype = config.get("dtype") if kind == "model" else None
    stored = f" Weights in {plain(str(dtype))}, safetensors." if dtype else ""
    return (
        f"{what}, {how} with {code(f'bico_ds {version}'.strip())}" + f", after step {facts.step:,}.{stored}"
    )


def _blend_text(blend: Blend) -> list[str]:
    return [
        f"Each weight is base + {blend.share} (trained − base), computed in fp32 (arXiv 2109.01903).",
        "",
        *table(
            ("blend", ""),
            [("share of the trained weights", f"{blend.share}"), ("step of the trained weights", f"{blend.step:,}")],
        ),
    ]  # fmt: skip


def _use_text(facts: ExportFacts, config: Mapping[str, Any], kind: Kind) -> Iterator[str]:
    yield from ("## How to use it", "", "```python", _ADAPTER if kind == "adapter" else _MODEL, "```", "")
    adds_bos = facts.record.get("export", {}).get("add_bos")
    if adds_bos is not None:
        yield f"Texts {'began' if adds_bos else 'did not begin'} with BOS in training; the tokenizer here does the same."
    sources = facts.recipe.data.sources
    chats = [source.messages_field is not None for source in sources]
    if all(chats):
        yield "Trained on chats: ask by the tokenizer's chat template."
    elif any(chats):
        yield "Trained on chats, by the tokenizer's chat template, and on plain texts."
    else:
        yield "Trained on plain texts: ask as a text that is to go on, without a chat template."
    if any(source.leading_space for source in sources):
        yield "Some texts began with a space."
    if kind == "model":
        yield ""
        yield "It is an ordinary folder of transformers: `transformers serve` and `lm-eval --model hf` take it as it is."


def _cite_text(base: BasePapers | None) -> Iterator[str]:
    yield from ("## How to cite", "", "BICO, the method:", "", "```bibtex", BICO_PAPER, "```", "")
    yield "The program: bico_ds, as its CITATION.cff says."
    if base is not None:
        yield f"The base: {code(base.name)}, as its own card asks."
