"""The part of a model card that says how the weights came about: base, settings, objectives, data, versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bico_ds.training.export.base_papers import BasePapers
from bico_ds.training.export.facts import ExportFacts
from bico_ds.training.export.markdown import code, plain, table

_UNKNOWN = "not recorded by the run"
_FINGERPRINT_SHOWN = 16


def training_text(facts: ExportFacts, base: BasePapers | None, config: Mapping[str, Any]) -> list[str]:
    """The lines of the section. `base`: None where the run began with random weights; `config`: the model's config.json."""
    objectives = list(_objective_rows(facts, config))
    return [
        "## How it was trained",
        "",
        *table(("setting", "value"), [*_settings(facts, base), *_versions(facts)]),
        "",
        *table(("objective", "share of the steps", "masked", "updates", "tokens of the texts", "FLOPs"), objectives),
        "",
        *table(("data", "documents", "tokens", "fingerprint of the contents"), _source_rows(facts.sources)),
    ]  # fmt: skip


def shown_name(base: BasePapers) -> str:
    """The base's name, with its revision where that is known."""
    return code(base.name) + (f", revision {code(base.revision)}" if base.revision is not None else "")


def _settings(facts: ExportFacts, base: BasePapers | None) -> Iterator[tuple[str, str]]:
    recipe = facts.recipe
    yield "run", code(recipe.name)
    yield "base", shown_name(base) if base is not None else f"random weights of seed {recipe.seed}"
    if base is not None:
        yield "fingerprint of the base's weights", code(facts.base) if facts.base else _UNKNOWN
    whole = recipe.training.steps
    yield "steps", f"{facts.step:,}" + (f" of {whole:,}" if whole is not None and whole != facts.step else "")
    batch = recipe.training.global_batch_bins
    yield "global batch", f"{batch:,} bins, at most {batch * recipe.data.capacity:,} tokens"
    yield "trained", _what_is_trained(facts)
    schedule, optimizer = recipe.schedule, recipe.optimizer
    yield (
        "learning rate",
        f"{optimizer.lr:g}, {plain(schedule.name)} with {schedule.warmup_steps:,} steps of warm-up",
    )
    yield "weight decay", f"{optimizer.weight_decay:g}"
    yield "seed", str(recipe.seed)
    layout = facts.record["layout"]
    yield "ranks", f"{layout['ranks']:,}, ZeRO {layout['zero_stage']}, {plain(str(layout['dtype']))}"
    if recipe.retention is not None:
        yield "retention", f"a KL term of weight {recipe.retention.kl:g} to the base"


def _what_is_trained(facts: ExportFacts) -> str:
    lora = facts.recipe.model.lora
    if lora is None:
        return "all weights"
    scaled = "alpha / sqrt(rank)" if lora.rslora else "alpha / rank"
    return (
        f"LoRA adapters of rank {lora.rank}, alpha {lora.alpha:g}, scaled by {scaled}, of "
        f"{plain(', '.join(lora.targets))}"
    )


def _versions(facts: ExportFacts) -> Iterator[tuple[str, str]]:
    versions = facts.start.get("versions")
    if isinstance(versions, dict):
        yield "versions", plain(", ".join(f"{name} {version}" for name, version in versions.items()))
    else:
        yield "versions", _UNKNOWN
    if commit := facts.start.get("commit"):
        yield "commit of bico_ds", code(str(commit))


def _objective_rows(facts: ExportFacts, config: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    flops, work = facts.flops(config), facts.work
    for (name, spec), probability in zip(facts.objectives.items(), facts.probabilities, strict=False):
        done = work.get(name) if work else None
        figures = ["0", "0"] if work else [_UNKNOWN, _UNKNOWN]
        if done is not None:
            figures = [f"{done['updates']:,}", f"{done['tokens']:,}"]
        counted = f"{flops[name]:.3g}" if name in flops else "0" if flops else _UNKNOWN
        yield plain(name), f"{probability:.1%}", _masked(spec.get("mask")), *figures, counted


def _masked(mask: Any) -> str:
    """As `15% of the tokens`; nothing where none are masked."""
    if not isinstance(mask, dict) or "rate" not in mask:
        return ""
    rate = mask["rate"]
    low, high = rate if isinstance(rate, list | tuple) else (rate, rate)
    share = f"{low:.0%}" if low == high else f"{low:.0%} to {high:.0%}"
    eligible = mask.get("eligible", "all")
    of_what = "" if eligible == "all" else f" of the {plain(str(eligible))}"
    return f"{share}{of_what}, by {plain(str(mask.get('unit', 'token')))}"


def _source_rows(sources: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    for source in sources:
        counts = [f"{source[key]:,}" if key in source else _UNKNOWN for key in ("documents", "tokens")]
        fingerprint = source.get("fingerprint")
        yield plain(str(source["name"])), *counts, code(str(fingerprint)) if fingerprint else _UNKNOWN
