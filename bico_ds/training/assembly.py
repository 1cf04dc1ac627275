"""From the recipe to what a run works on: tokenizer, stores, objectives, loader, tasks. One process can build it alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from bico_ds.cluster.preflight.inputs import files_digest
from bico_ds.common.errors import UserError
from bico_ds.common.json_files import JsonError, read_object
from bico_ds.config.objectives.table import numbers_in_kind, objective_names
from bico_ds.config.paths import FolderOrHub
from bico_ds.config.schema import Recipe
from bico_ds.config.section import STEPS
from bico_ds.config.sections.keep_best import metrics_of, unknown_metric
from bico_ds.config.sections.model import ModelSpec
from bico_ds.data.exported_tokenizer import ExportedTokenizer, misreading
from bico_ds.data.loading.loader import ElasticLoader, RankShare
from bico_ds.data.loading.sample_order import StreamSpec
from bico_ds.data.prepare.chats import template_begins_with_bos
from bico_ds.data.prepare.recipe_sources import facts_folder, prepare_source
from bico_ds.data.replay.sampled_store import SampleShare
from bico_ds.data.replay.source import check_sampled, prepare_sampled, sampled_path, spec_of, stand_in
from bico_ds.data.reply_ends import unstopped_replies
from bico_ds.data.store import TokenStore, Verify
from bico_ds.data.teacher.opening import open_teachers
from bico_ds.data.teacher.stored import StoredTeacher
from bico_ds.data.token_roles import token_roles
from bico_ds.data.tokenizer import (
    FastTokenizer,
    Tokenizer,
    load_tokenizer,
    needed_vocabulary,
    vocabulary_size,
)
from bico_ds.evaluation.held_out.stores import HeldOutStore, check_held_out, read_held_out
from bico_ds.evaluation.loading import load_for_evaluation, load_generation_config
from bico_ds.evaluation.report.metric_keys import less_is_better
from bico_ds.evaluation.retention_texts import RetentionText, check_texts, read_texts
from bico_ds.evaluation.run_tasks import options_in_training, prepare_task, unreachable_answers
from bico_ds.evaluation.scoring.choice import encode_candidates
from bico_ds.evaluation.scoring.generation import stop_ids
from bico_ds.evaluation.scoring.metrics import metrics_of as answer_metrics
from bico_ds.evaluation.tasks.of_recipe import check_questions, tasks_of_recipe
from bico_ds.evaluation.tasks.task import Task
from bico_ds.model.architecture import adopt_special_tokens, check_vocabulary, id_list, with_own_config
from bico_ds.model.weights.export_checkpoint import start_folder
from bico_ds.model.weights.load import weight_files
from bico_ds.objectives.build import build_objectives
from bico_ds.objectives.schedule import ObjectiveSchedule
from bico_ds.planner.compute.shares import StepShares
from bico_ds.runtime import distributed, launch_environment

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInputs:
    """What the recipe names for a run to read: everything but model and loader."""

    tokenizer: FastTokenizer
    tokenizer_path: FolderOrHub
    stores: list[TokenStore]
    vocabulary: int  # ids that the model embeds
    schedule: ObjectiveSchedule
    tasks: list[Task]
    chats_begin_with_bos: bool = False  # where a source's texts are written by the chat template
    texts: list[RetentionText] = field(default_factory=list)
    held_out: list[HeldOutStore] = field(default_factory=list)
    teachers: Mapping[int, StoredTeacher] = field(default_factory=dict)  # by the source's number
    source_names: Sequence[str] = ()
    stops: Sequence[int] = ()  # ids at which generation from the export stops

    @property
    def add_bos(self) -> bool:
        """Whether most training texts begin with BOS, as prompts then must."""
        return 2 * self.texts_with_bos >= sum(map(len, self.stores)) and self.texts_with_bos > 0

    @property
    def exported_tokenizer(self) -> ExportedTokenizer:
        """The tokenizer as the run's export carries it."""
        return ExportedTokenizer(self.tokenizer, self.add_bos)

    @property
    def texts_with_bos(self) -> int:
        """How many training texts begin with BOS."""
        return sum(len(store) for store in self.stores if store.manifest.add_bos)


def tokenizer_path(recipe: Recipe, *, weights_needed: bool = True) -> FolderOrHub:
    """Which tokenizer the recipe means: its own, the start model's, that of a store as first source, or the embedded task's.

    Without `weights_needed` (dry runs), a start model that is not on this machine is passed over. Raises `UserError` where
    none of the four is there.
    """
    spec = recipe.model
    if spec.tokenizer is not None:
        return spec.tokenizer.here()
    if spec.path is not None and (spec.path.is_here() or weights_needed):
        return spec.path.here()
    if (of_store := store_tokenizer(recipe)) is not None:
        return of_store
    if any(source.facts for source in recipe.data.sources):
        return facts_folder(recipe.data) / "tokenizer"
    if spec.path is None:
        raise UserError("model.tokenizer: give a tokenizer; without model.path there is none to take")
    if spec.path.is_folder:
        raise UserError(
            f"model.path: '{spec.path}' is not on this machine, nor is its tokenizer; "
            "set model.tokenizer=FOLDER, or a hub name (owner/name)"
        )
    return spec.path.here()


def store_tokenizer(recipe: Recipe) -> Path | None:
    """The tokenizer in the first source's folder, where that source is a store and has one."""
    first = recipe.data.sources[0]
    folder = first.store.here() / "tokenizer" if first.store is not None else None
    return folder if folder is not None and folder.is_dir() else None


def prepare_stores(recipe: Recipe, *, weights_needed: bool = True, progress: bool = True) -> list[Path]:
    """The store of every source, made where it is not there yet. One process at a time: rank 0, before the others join.

    Raises `UserError` for a tokenizer that cannot be the model's before anything is tokenized, as far as the model is here.
    The first process of a machine compares the stores' checksums, as `TokenStore.open` does with `verify="once"`; the others
    rely on it.
    """
    check_sampled(recipe)
    check_questions(recipe)
    path = tokenizer_path(recipe, weights_needed=weights_needed)
    verify: Verify = "once" if launch_environment.local_rank() == 0 else "structure"
    check_texts(recipe, verify=verify)
    check_held_out(recipe, verify=verify)
    limit = _limit_of_ids(recipe, path, weights_needed=weights_needed)
    return [
        prepare_source(source, recipe.data, path, progress=progress, verify=verify, vocab_size=limit)
        if source.sampled is None
        else _prepare_sampled(recipe, source.sampled, path, weights_needed, progress, verify)
        for source in recipe.data.sources
    ]


def _limit_of_ids(recipe: Recipe, path: FolderOrHub, *, weights_needed: bool) -> int | None:
    """How many ids texts may have where the model embeds fewer than the tokenizer has, and may; None: all.

    Nothing is known where the tokenizer only stands in for that of a model that is not here, or whose config is not.
    """
    spec = recipe.model
    if (
        not weights_needed and spec.config is not None
    ):  # then the path may name a variable that is not set here
        spec = spec.model_copy(update={"path": None})
    vocab_size = _model_value(spec, "vocab_size")
    if not _is_models_own_tokenizer(recipe) or not isinstance(vocab_size, int):
        return None
    tokenizer = load_tokenizer(path)
    check_vocabulary(vocab_size, needed_vocabulary(tokenizer, vocab_size), tokenizer=str(path))
    if vocabulary_size(tokenizer) <= vocab_size:
        return None
    for source in recipe.data.sources:
        if source.store is not None:
            _check_ids(TokenStore.open(source.store.here(), verify="structure"), vocab_size)
    return vocab_size


def _is_models_own_tokenizer(recipe: Recipe) -> bool:
    """Whether the tokenizer is not one that stands in for that of a model which is not here."""
    model = recipe.model
    return model.tokenizer is not None or model.path is None or start_folder(model) is not None


def _check_ids(store: TokenStore, limit: int) -> None:
    if (largest := store.manifest.max_token_id) >= limit:
        raise UserError(
            f"token store '{store.path}' has a document with the token id {largest}, and the model knows ids up to "
            f"{limit - 1}: prepare it again with --vocab-size {limit}, which names the file and line"
        )


def check_teachers(recipe: Recipe, paths: list[Path]) -> None:
    """Open the teacher of a recipe, if it has one, over the stores at these paths, and compare its checksums.

    On rank 0, before the others join. Raises `UserError` as `open_teachers` does.
    """
    open_teachers(recipe, [TokenStore.open(path, verify="structure") for path in paths], verify="once")


def _prepare_sampled(
    recipe: Recipe,
    tokens: int,
    tokenizer_path: FolderOrHub,
    weights_needed: bool,
    progress: bool,
    verify: Verify,
) -> Path:
    """The store of texts sampled from the start model; without `weights_needed` a stand-in where it is not there yet."""
    assert recipe.model.path is not None
    model, tokenizer = recipe.model.path.here(), load_tokenizer(tokenizer_path)
    if weights_needed or recipe.model.path.is_here():
        spec = spec_of(
            recipe,
            tokens,
            tokenizer,
            stops=tuple(stop_ids(load_generation_config(model), tokenizer)),
            weights=f"{_weights_name(model)} {recipe.model.dtype}",
        )
        if weights_needed or sampled_path(recipe, spec, tokenizer).exists():
            device, dtype = distributed.read_ranks().device, recipe.model.dtype
            return prepare_sampled(
                recipe,
                spec,
                tokenizer,
                load=lambda: load_for_evaluation(model, option="model.path", dtype=dtype, device=device)[0],
                share=SampleShare(device=device, progress=progress),
                verify=verify,
            )
    logger.warning(
        "note: a start samples %s tokens from %s; until then, random texts that fill a bin are counted",
        f"{tokens:,}",
        model,
    )
    return stand_in(recipe, tokens, tokenizer)


def _weights_name(model: FolderOrHub) -> str:
    """A name of the weights at `model` that is the same on all nodes, whenever they were copied there."""
    if not isinstance(model, Path):
        return model
    return files_digest(sorted({*weight_files(model), model / "config.json"}))


def open_inputs(recipe: Recipe, *, weights_needed: bool = True) -> RunInputs:
    """Open what `prepare_stores` made, or make it now.

    Raises `UserError` for a store of another tokenizer, for objectives that do not fit the tokenizer, where tasks are asked
    and only some stores have BOS, for tasks that are missing, have prompts that do not fit the context, or lack wrong
    answers for `evaluation.likelihood_others`, for a `checkpoint.keep_best` that nothing measures, and what `read_texts` and
    `read_held_out` refuse.
    """
    path = tokenizer_path(recipe, weights_needed=weights_needed)
    tokenizer = load_tokenizer(path)
    stores = _open_stores(prepare_stores(recipe, weights_needed=weights_needed, progress=False), tokenizer)
    if recipe.evaluation.task_names and len({store.manifest.add_bos for store in stores}) > 1:
        raise UserError(
            "data.sources: some texts begin with BOS and some do not; an evaluation cannot ask in both ways. "
            "Give all the same add_bos, or set evaluation.tasks=[]"
        )
    vocabulary = _model_value(recipe.model, "vocab_size") or vocabulary_size(tokenizer)
    tokens = token_roles(tokenizer, vocabulary=vocabulary)
    objectives = build_objectives(recipe.objectives, tokens)
    schedule = ObjectiveSchedule(objectives, [spec.probability for spec in recipe.objectives], recipe.seed)
    inputs = RunInputs(
        tokenizer,
        path,
        stores,
        tokens.vocabulary,
        schedule,
        tasks_of_recipe(recipe),
        any(
            source.messages_field is not None and store.manifest.add_bos
            for source, store in zip(recipe.data.sources, stores, strict=True)
        ),
        teachers=open_teachers(recipe, stores, verify="structure", weights_needed=weights_needed),
        source_names=recipe.data.source_names,
        stops=_stops_of_export(recipe, tokenizer, tokens.vocabulary),
    )
    context = _model_value(recipe.model, "max_position_embeddings")
    inputs = replace(
        inputs,
        texts=read_texts(recipe, tokenizer, stores, context=context, add_bos=inputs.add_bos),
        held_out=read_held_out(recipe, tokenizer, stores, objectives, vocabulary=tokens.vocabulary),
    )
    _check_best(recipe, inputs.tasks)
    _check_tasks(recipe, inputs, context if _is_models_own_tokenizer(recipe) else None)
    return inputs


def _check_best(recipe: Recipe, tasks: list[Task]) -> None:
    """Raise `UserError` where `checkpoint.keep_best` goes by a metric that a task does not have."""
    if (best := recipe.checkpoint.keep_best) is None:
        return
    answers = {task.name: answer_metrics(task) for task in tasks}
    known = metrics_of(recipe.evaluation, objective_names(recipe.objectives), answers)
    if (problem := unknown_metric(best.metric, known)) is not None:
        raise UserError(f"checkpoint.keep_best.metric: {problem}")


def _check_tasks(recipe: Recipe, inputs: RunInputs, context: int | None) -> None:
    """Refuse now, and not at the first evaluation, prompts that are too long and tasks that lack wrong answers."""
    spec, tokenizer, add_bos = recipe.evaluation, inputs.tokenizer, inputs.add_bos
    for task in inputs.tasks:
        prepare_task(tokenizer, task, options_in_training(spec, add_bos=add_bos), context=context)
        if spec.likelihood_others is not None:
            encode_candidates(tokenizer, task, others=spec.likelihood_others, add_bos=add_bos, context=None)


def _open_stores(paths: list[Path], tokenizer: Tokenizer) -> list[TokenStore]:
    stores = [TokenStore.open(path, verify="structure") for path in paths]
    for store in stores:
        store.check_tokenizer(tokenizer)
    return stores


def build_loader(
    recipe: Recipe, inputs: RunInputs, share: RankShare, *, state: dict[str, Any] | None = None
) -> ElasticLoader:
    """The loader of this rank's micro-batches, from `state` on.

    Raises `UserError` for objectives that a store cannot serve, and for what else `ElasticLoader` refuses.
    """
    stream = StreamSpec(
        stores=inputs.stores,
        data=recipe.data,
        schedule=inputs.schedule,
        seed=recipe.seed,
        global_batch_bins=recipe.training.global_batch_bins,
        vocabulary=inputs.vocabulary,
        retention=recipe.retention,
        teachers=inputs.teachers,
        sources_of=[recipe.data.source_numbers(spec.sources) for spec in recipe.objectives],
        draws=numbers_in_kind(recipe.objectives),
        shares=_step_shares(recipe),
    )
    return ElasticLoader(stream, share, state=state)


def _step_shares(recipe: Recipe) -> StepShares | None:
    if recipe.share_by == "steps":
        return None
    if recipe.share_by == "tokens" or recipe.model.config is not None:
        return StepShares(recipe=recipe)
    return StepShares(recipe=recipe.model_copy(update={"model": with_own_config(recipe.model)}))


def total_steps(recipe: Recipe, loader: ElasticLoader) -> int:
    """Length of the run in optimizer steps. Raises `UserError` where its epochs are more steps than a run may have."""
    if recipe.training.steps is not None:
        return recipe.training.steps
    assert recipe.training.epochs is not None
    named = recipe.training.epochs_of
    source = recipe.data.source_names.index(named) if named is not None else None
    steps = loader.total_steps(recipe.training.epochs, source=source)
    if (problem := STEPS.problem(steps)) is not None:
        raise UserError(f"training.epochs: {recipe.training.epochs:g} are {steps:,} steps, which {problem}")
    return steps


def question_warnings(recipe: Recipe, inputs: RunInputs) -> list[str]:
    """What makes the scores of the evaluations other than they seem, or the best checkpoint the worst, a line each."""
    spec, best = recipe.evaluation, recipe.checkpoint.keep_best
    options, lines = options_in_training(spec, add_bos=inputs.add_bos), []
    for task in inputs.tasks:
        if count := unreachable_answers(inputs.tokenizer, task, options):
            lines.append(
                f"task {task.name}: {count:,} of {len(task):,} answers have more tokens than evaluation.max_new_tokens "
                f"({spec.max_new_tokens}), so that no model can give them whole; raise it"
            )
    if best is not None and (best.mode == "min") != less_is_better(best.metric):
        better = "less" if best.mode == "max" else "more"
        lines.append(
            f"checkpoint.keep_best: {better} of {best.metric} is better, and mode {best.mode} keeps and exports the worst"
        )
    return lines


def export_warnings(inputs: RunInputs, config: PretrainedConfig) -> list[str]:
    """What whoever uses the export should know, a line each; `config`: the model's."""
    lines = [misreading(inputs.exported_tokenizer, config)]
    texts, with_bos = sum(map(len, inputs.stores)), inputs.texts_with_bos
    if 0 < with_bos < texts:
        does = "adds" if inputs.add_bos else "does not add"
        lines.append(
            f"{with_bos:,} of {texts:,} texts begin with BOS, and the export's tokenizer {does} it: prompts like the other "
            "texts are asked otherwise than trained. Give all sources the same add_bos"
        )
    if inputs.chats_begin_with_bos and not template_begins_with_bos(inputs.tokenizer):
        lines.append(
            "the chats begin with BOS, which the chat template does not write, and programs that go by the template ask "
            "without it. Set add_bos: false for them, or begin the template with {{ bos_token }}"
        )
    if inputs.stops:
        pairs = zip(inputs.source_names, inputs.stores, strict=True)
        lines += [unstopped_replies(name, store, inputs.tokenizer, inputs.stops) for name, store in pairs]
    pad = inputs.tokenizer.pad_token_id
    if pad is not None and pad >= config.vocab_size:
        lines.append(
            f"the tokenizer's padding token has id {pad}, and the model embeds {config.vocab_size}: the export names no "
            "padding token in config.json. Set tokenizer.pad_token = tokenizer.eos_token where batches are padded"
        )
    if with_space := sum(len(store) for store in inputs.stores if store.manifest.leading_space):
        lines.append(
            f"{with_space:,} of {texts:,} texts begin with a space (leading_space), and the tasks' prompts, and those of "
            "programs that use the export, do not: mix in a source without it, or begin prompts with a space"
        )
    return [line for line in lines if line is not None]


def _stops_of_export(recipe: Recipe, tokenizer: FastTokenizer, vocabulary: int) -> list[int]:
    """The ids at which generation from the run's export stops, as `adopt_special_tokens` decides."""
    folder, generation = start_folder(recipe.model), GenerationConfig()
    if folder is not None:
        with suppress(UserError):  # a config that makes no model is refused where the model is built
            generation = load_generation_config(folder)
    adopt_special_tokens(
        ExportedTokenizer(tokenizer, None), PretrainedConfig.from_dict({"vocab_size": vocabulary}), generation
    )
    return id_list(generation.eos_token_id)


def _model_value(model: ModelSpec, key: str) -> int | None:
    """Of the model's config, where recipe or model folder give it; `vocab_size` is often more than the tokenizer has."""
    if model.config is not None:
        return model.config.get(key)
    if model.path is None or not model.path.is_here():
        return None
    file = Path(model.path.here()) / "config.json"
    try:
        return read_object(file, strict=False).get(key)
    except JsonError as error:
        if error.is_missing:
            return None
        raise UserError(f"model.path: {file}: cannot be read: {error.reason}; copy it again") from None
