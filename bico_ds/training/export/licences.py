"""The licences that bases come with, and what they ask of a model that was made from one and is passed on.

A licence is known by its title, or by the name that the hub has for it in a model's card. What is said of it here is what
its own text says, at the section named; nobody is spared reading it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_TITLE_CHARACTERS = 600  # at the top of a text, in which its title stands
_MARKS = re.compile(r"[\s_.-]+")


@dataclass(frozen=True, kw_only=True)
class Licence:
    """A licence, as far as it says under which conditions a fine-tuned model may be passed on.

    `hub_id` and `hub_name`: `license` and `license_name` in a model's card. `title`: what the top of its text has, in
    capitals, blanks as one. `section`: where its conditions stand. `prefix`: with what a model's name must begin.
    `display`: what must be shown where the model is presented. `notice`: the text that a file NOTICE must hold. `further`:
    other conditions, each a sentence.
    """

    name: str
    hub_id: str
    title: str
    section: str
    hub_name: str | None = None
    prefix: str | None = None
    display: str | None = None
    notice: str | None = None
    further: tuple[str, ...] = ()

    def allows_name(self, name: str) -> bool:
        """Whether a model may be called so, capitals and separators aside: `llama3_8b` begins with `Llama 3`."""
        return self.prefix is None or _plain(name).startswith(_plain(self.prefix))

    def suggested(self, name: str) -> str:
        """A name that it allows."""
        return name if self.prefix is None else f"{self.prefix.replace(' ', '-')}-{name}"

    def conditions(self) -> list[str]:
        """What it asks for, a sentence each."""
        asked = [f"A copy of the licence goes with the model ({self.section})."]
        if self.prefix is not None:
            asked.append(f"The name of the model begins with “{self.prefix}” ({self.section}).")
        if self.display is not None:
            asked.append(f"{self.display} is shown where the model is presented ({self.section}).")
        if self.notice is not None:
            asked.append(f"A text file NOTICE says: “{self.notice}”")
        return [*asked, *self.further]


def _llama(version: str, *, prefix: str, display: str, meta: str = "") -> Licence:
    """One of Meta's from Llama 3 on: https://github.com/meta-llama/llama-models, models/llama3_1/LICENSE and its like."""
    return Licence(
        name=f"{meta}Llama {version} Community License",
        hub_id=f"llama{version}",
        title=f"LLAMA {version} COMMUNITY LICENSE AGREEMENT",
        section="section 1.b",
        prefix=prefix,
        display=f"“{display}”",
        notice=(
            f"{meta}Llama {version} is licensed under the {meta}Llama {version} Community License, Copyright © Meta "
            "Platforms, Inc. All Rights Reserved."
        ),
        further=("Its Acceptable Use Policy goes on to hold.",),
    )


def _qwen(kind: str, hub_name: str, *further: str) -> Licence:
    """Alibaba's of 19 September 2024: https://huggingface.co/Qwen/Qwen2.5-72B/blob/main/LICENSE, Qwen2.5-3B alike."""
    return Licence(
        name=f"Qwen {kind}LICENSE AGREEMENT",
        hub_id="other",
        hub_name=hub_name,
        title=f"QWEN {kind}LICENSE AGREEMENT",
        section="sections 3 and 4",
        display="“Built with Qwen” or “Improved using Qwen”",
        notice=(
            f"Qwen is licensed under the Qwen {kind}LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights Reserved."
        ),
        further=("Files that were changed say so.", *further),
    )


LICENCES = (
    # https://huggingface.co/meta-llama/Llama-2-7b/blob/main/LICENSE.txt, section 1.b: no rule for names.
    Licence(
        name="LLAMA 2 Community License",
        hub_id="llama2",
        title="LLAMA 2 COMMUNITY LICENSE AGREEMENT",
        section="section 1.b",
        notice=(
            "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights "
            "Reserved."
        ),
        further=(
            "Its Acceptable Use Policy goes on to hold.",
            "No other large language model may be improved with it or its outputs, but for Llama 2 and what "
            "is made from it.",
        ),
    ),
    _llama("3", prefix="Llama 3", display="Built with Meta Llama 3", meta="Meta "),
    _llama("3.1", prefix="Llama", display="Built with Llama"),
    _llama("3.2", prefix="Llama", display="Built with Llama"),
    _llama("3.3", prefix="Llama", display="Built with Llama"),
    _qwen("", "qwen"),
    _qwen("RESEARCH ", "qwen-research", "Only research and evaluation are allowed, nothing commercial."),
    Licence(
        name="Apache License 2.0",
        hub_id="apache-2.0",
        title="APACHE LICENSE VERSION 2.0",
        section="section 4",
        further=(
            "Files that were changed say so; the base's NOTICE, where it has one, is kept (section 4).",
        ),
    ),
    Licence(
        name="MIT License",
        hub_id="mit",
        title="PERMISSION IS HEREBY GRANTED, FREE OF CHARGE",
        section="its second paragraph",
    ),
)
"""Those of the model families that can be trained."""


def licence_of_text(text: str) -> Licence | None:
    """The licence whose text this is; None where it is none of `LICENCES`."""
    top = " ".join(re.sub(r"[*#,]", " ", text).split()).upper()[:_TITLE_CHARACTERS]
    titles = [licence for licence in LICENCES if licence.title.replace(",", "") in top]
    return titles[0] if titles else None


def licence_of_card(values: dict[str, Any]) -> Licence | None:
    """The licence that the head of a model's card names; None where it names none of `LICENCES`."""
    named = (values.get("license"), values.get("license_name"))
    for licence in LICENCES:
        if named[0] == licence.hub_id and (licence.hub_name is None or named[1] == licence.hub_name):
            return licence
    return None


def _plain(name: str) -> str:
    return _MARKS.sub("", name).lower()
