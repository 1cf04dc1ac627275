"""What `bico-ds evaluate` was asked for, as parts of a result file, computed one after the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from transformers import GenerationConfig

from bico_ds.attention.backends import resolve
from bico_ds.attention.layout import LayoutPolicy
from bico_ds.common.errors import UserError
from bico_ds.config.paths import FolderOrHub
from bico_ds.config.schema import Recipe
from bico_ds.data.exported_tokenizer import adds_bos
from bico_ds.data.store import TokenStore
from bico_ds.data.token_roles import token_roles
from bico_ds.data.tokenizer import FastTokenizer, load_tokenizer
from bico_ds.evaluation.agreement import agreement, answers_of_base
from bico_ds.evaluation.contamination import TrainingTexts, apart, find_orders, open_training_texts
from bico_ds.evaluation.held_out import loss as held_out_loss
from bico_ds.evaluation.held_out.stores import HeldOutStore, check_held_out, read_held_out
from bico_ds.evaluation.instructions import Instruction, read_instructions
from bico_ds.evaluation.loading import (
    begins_with_bos,
    config_at,
    load_for_evaluation,
    load_generation_config,
    load_tokenizer_and_context,
    weights_stamp,
)
from bico_ds.evaluation.prompt_progress import PromptProgress
from bico_ds.evaluation.report.held_out import loss_table
from bico_ds.evaluation.report.samples import sample_lines
from bico_ds.evaluation.report.tables import (
    agreement_table,
    answered_line,
    choice_tables,
    contamination_table,
    result_table,
    retention_table,
    search_notes,
)
from bico_ds.evaluation.result_file import Part, ResultFile
from bico_ds.evaluation.results import EvaluationResult
from bico_ds.evaluation.retention_texts import RetentionText, measure, read_texts
from bico_ds.evaluation.run_tasks import (
    GenerationOptions,
    evaluate,
    options_in_training,
    prepare_task,
    score_task,
)
from bico_ds.evaluation.scoring.choice import choice_test, encode_candidates
from bico_ds.evaluation.scoring.generation import beyond_greedy, stop_ids
from bico_ds.evaluation.scoring.likelihood import encode_windows, text_perplexity
from bico_ds.evaluation.scoring.metrics import SCORING_VERSION
from bico_ds.evaluation.scoring.share import PromptShare
from bico_ds.evaluation.tasks.further_sets import READERS
from bico_ds.evaluation.tasks.of_recipe import tasks_of_recipe
from bico_ds.evaluation.tasks.task import Task, load_tasks
from bico_ds.model.build import TrainableModel, as_trained
from bico_ds.model.swap import check_attention
from bico_ds.model.weights.adapter_folder import AdapterFolder
from bico_ds.objectives.build import build_objectives

_WINDOWS_PER_BATCH = 4  # a window of a retention text is long, and has logits of every token


Load = Callable[[FolderOrHub, str], tuple[Any, Any]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to ask of which model.

    `data`: folder of the name-description tasks `tasks`. `further`: files of other test sets, by their kind in
    `further_sets.READERS`. `retention`: texts to measure perplexity on, in windows of `window` tokens. `instructions`: a
    file of instructions, to compare the answers with the base's. `base`: the model before fine-tuning. `likelihood`: run
    the log-probability test, against `others` other persons' answers. `limit`: prompts of each task at most. `train`: token
    stores to search for the questions, so that what their texts hold in the order asked is scored apart. `bos`: whether
    texts begin with BOS; None: as `begins_with_bos` says. `recipe`: what it asks during training is asked in the same way,
    in place of `data` and `further` (`asking_as`). `samples`: answers of each task that are shown.
    """

    model: FolderOrHub
    output: Path
    data: Path | None = None
    tasks: tuple[str, ...] = ()
    further: Mapping[str, Path] = field(default_factory=dict)
    retention: tuple[Path, ...] = ()
    instructions: Path | None = None
    base: FolderOrHub | None = None
    likelihood: bool = False
    limit: int | None = None
    max_new_tokens: int = 40
    others: int = 9
    train: tuple[Path, ...] = ()
    window: int = 1024
    bos: bool | None = None
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    recipe: Recipe | None = None
    samples: int = 0

    @cached_property
    def add_bos(self) -> bool:
        """Whether texts begin with BOS, where the tokenizer has one."""
        if self.bos is not None:
            return self.bos
        return begins_with_bos(self.model, self.tokenizer)

    @cached_property
    def stops(self) -> list[int]:
        """The tokens at which answers end."""
        return stop_ids(self.generation_config, self.tokenizer)

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The model's."""
        return load_generation_config(self.model)

    @cached_property
    def tokenizer(self) -> FastTokenizer:
        """The model's."""
        return load_tokenizer(self.model)

    @property
    def generation(self) -> GenerationOptions:
        """As in the papers: every answer may have up to `max_new_tokens`; or as during the training of a recipe."""
        if self.recipe is not None:
            return options_in_training(self.recipe.evaluation, add_bos=self.add_bos)
        return GenerationOptions(
            max_new_tokens=self.max_new_tokens, cut_to_answers=False, add_bos=self.add_bos
        )


def asking_as(recipe: Recipe, request: Request) -> Request:
    """The request with what the recipe's `evaluation` asks. Raises `UserError` where that is nothing."""
    spec = recipe.evaluation
    if not spec.tasks:
        raise UserError(
            f"--tasks-from {recipe.name}: its evaluation.tasks are empty, so there is nothing to ask"
        )
    return replace(
        request,
        recipe=recipe,
        max_new_tokens=spec.max_new_tokens,
        likelihood=spec.likelihood_others is not None,
        others=spec.likelihood_others or request.others,
    )


def run_request(request: Request, share: PromptShare, console: Console) -> bool:
    """Compute what the result file lacks, and show on the first rank what was asked for. Collective.

    Returns False where it was stopped before the end. Raises `UserError` for bad input, before a model is loaded, and for
    weights that cannot be loaded.
    """
    tasks = _read_tasks(request)
    recipe_texts = _read_recipe_texts(request)
    texts = _read_texts(request.retention)
    window = _check_inputs(request, tasks, texts)
    instructions = _read_instructions(request)
    training_texts = open_training_texts(request.train, request.model)
    held_out = _read_held_out(request, [store for store, _ in training_texts.stores], share)
    load = lru_cache(maxsize=1)(  # one model in memory at a time
        lambda path, option: load_for_evaluation(
            path, option=option, dtype=request.dtype, device=share.device
        )
    )
    weights = weights_stamp(request.model)
    file = ResultFile(
        request.output, model=str(request.model), weights=f"{weights} {request.dtype}", share=share
    )
    if share.is_first:
        for line in _how_asked(request):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    with PromptProgress(console, share) as progress:
        counted = replace(share, on_batch=progress.advance)
        parts = [
            *_answer_parts(request, counted, instructions, load),
            *_retention_parts(request, share, texts, window, load),
            *_recipe_text_parts(request, share, recipe_texts, load),
            *_agreement_parts(request, counted, instructions, load, file),
            *(part for task in tasks for part in _task_parts(request, counted, task, load, file)),
            *_held_out_parts(request, counted, held_out, load),
            *_contamination_parts(request, counted, tasks, training_texts, file),
        ]
        finished = file.run(parts, progress.begin_part)
    if share.is_first:
        show_results(
            file.results(parts), file.values.get("retention_before", {}), console, samples=request.samples
        )
        console.print(f"written: {request.output}", soft_wrap=True, highlight=False)
    return finished


def _read_tasks(request: Request) -> list[Task]:
    if request.recipe is not None:
        return tasks_of_recipe(request.recipe)
    tasks = load_tasks(request.data, request.tasks, request.limit) if request.data else []
    for kind, path in request.further.items():
        tasks += READERS[kind](path, request.limit)
    return tasks


def _read_recipe_texts(request: Request) -> list[RetentionText]:
    """The recipe's texts, in the windows of its training."""
    if request.recipe is None or not request.recipe.evaluation.texts:
        return []
    tokenizer, context = load_tokenizer_and_context(request.model)
    return read_texts(request.recipe, tokenizer, (), context=context, add_bos=request.add_bos)


def show_results(
    results: Mapping[str, Any], before: Mapping[str, Any], console: Console, *, samples: int = 0
) -> None:
    """Print the tables of `results`, by section; `before`: perplexities under the base model, by text.

    `samples`: how many answers of each task are shown.
    """
    plain = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    if "tasks" in results:
        result = EvaluationResult.from_json(results)
        scored = {"score [95 % interval]": result}
        console.print(result_table(scored))
        if "training_texts" in results:
            console.print(contamination_table(scored))
            plain(answered_line(results["training_texts"]))
            for remark in search_notes(results["training_texts"]):
                plain(f"note: {remark}")
        for line in sample_lines(result, samples):
            plain(line)
    if "choice" in results:
        for table in choice_tables(results["choice"]):
            console.print(table)
    for name, text in results.get("texts", {}).items():
        plain(f"text {name}: perplexity {text['perplexity']:.2f} over {text['tokens']:,} tokens")
    if "held_out" in results:
        console.print(loss_table({"loss": EvaluationResult(tasks={}, held_out=results["held_out"])}))
    if "retention" in results:
        console.print(retention_table(results["retention"], before))
    if "agreement" in results:
        console.print(agreement_table(results["agreement"]))


def _how_asked(request: Request) -> Iterator[str]:
    """How prompts begin and answers end, and where that is not what other programs do with this model."""
    tokenizer = request.tokenizer
    if (adapters := AdapterFolder.at(request.model)) is not None:
        yield f"{request.model}: {adapters.describe()}"
    name = tokenizer.convert_ids_to_tokens
    ends = [name(token) or f"token {token}, which its tokenizer lacks" for token in request.stops]
    has_bos = request.add_bos and tokenizer.bos_token_id is not None
    begins = f"begin with BOS {name(tokenizer.bos_token_id)}" if has_bos else "begin without BOS"
    yield f"prompts {begins}; answers end at {' or '.join(ends)}"
    if has_bos != adds_bos(tokenizer):
        does, option = ("adds it", "--bos") if not has_bos else ("adds none", "--no-bos")
        yield f"note: its tokenizer {does}, so other programs ask as {option} does"
    if tokenizer.eos_token_id not in request.stops:
        yield f"note: its generation config does not stop at the tokenizer's EOS {name(tokenizer.eos_token_id)}"
    if changes := beyond_greedy(request.generation_config):
        shown = ", ".join(f"{key} {value}" for key, value in changes.items())
        yield f"note: its generation config has {shown}, which `generate` heeds and these answers do not"


def _check_inputs(request: Request, tasks: Sequence[Task], texts: Mapping[str, str]) -> int:
    """The tokens per window of a retention text: `request.window`, or the smallest context of the models where that is less.

    Raises `UserError`, before any weights are loaded, for what these models cannot be asked.
    """
    tokenizer, context = load_tokenizer_and_context(request.model)
    for task in tasks:
        prepare_task(tokenizer, task, request.generation, context=context)
        if request.likelihood:
            encode_candidates(
                tokenizer, task, others=request.others, add_bos=request.add_bos, context=context
            )
    models = [(tokenizer, context)]
    if request.base is not None:
        models.append(load_tokenizer_and_context(request.base, option="--base"))
    window = min([request.window, *(context for _, context in models if context is not None)])
    for tokenizer, _ in models:
        for text in texts.values():
            encode_windows(tokenizer, text, window=window, add_bos=request.add_bos)
    return window


def _task_parts(
    request: Request, share: PromptShare, task: Task, load: Load, file: ResultFile
) -> Iterator[Part]:
    """The scored answers of a task, and with `likelihood` its log-probability test.

    Answers that an earlier version scored by other rules are scored again, without the model.
    """
    # Where answers end at EOS alone, the identity is that of earlier versions, which knew nothing else.
    stops = [] if request.stops == [request.tokenizer.eos_token_id] else [request.stops]
    cut = ["as long as its answers"] if request.generation.cut_to_answers else []
    identity = _task_identity(task, request.max_new_tokens, request.add_bos, *stops, *cut)

    def generate() -> dict[str, Any] | None:
        file.discard("training_texts", task.name)  # its scores are of the answers that are replaced now
        if (known := file.content("tasks", task.name, identity)) is not None:
            predictions = [row["prediction"] for row in known["rows"]]
            rescored = score_task(task, predictions, new_tokens=known["new_tokens"])
            return EvaluationResult(tasks={task.name: rescored}).to_json()["tasks"][task.name]
        model, tokenizer = load(request.model, "--model")
        result = evaluate(model, tokenizer, [task], request.generation, share)
        return None if result is None else result.to_json()["tasks"][task.name]

    def choose() -> dict[str, Any] | None:
        model, tokenizer = load(request.model, "--model")
        return choice_test(
            model, tokenizer, task, others=request.others, add_bos=request.add_bos, share=share
        )

    yield Part(
        section="tasks",
        name=task.name,
        identity=identity,
        size=len(task),
        compute=generate,
        is_current=lambda content: content.get("scoring") == SCORING_VERSION,
    )
    if request.likelihood:
        yield Part(
            section="choice",
            name=task.name,
            identity=_choice_identity(task, request),
            size=len(task) * (request.others + 1),
            compute=choose,
        )


def _contamination_parts(
    request: Request, share: PromptShare, tasks: Sequence[Task], texts: TrainingTexts, file: ResultFile
) -> Iterator[Part]:
    """What the training texts hold of each task's questions; they are read once, for all tasks."""
    if not request.train:
        return
    orders = lru_cache(maxsize=1)(lambda: find_orders(tasks, texts, share))

    def compute(task: Task) -> dict[str, Any] | None:
        found = orders()
        if found is None:
            return None
        result = EvaluationResult.from_json({"tasks": {task.name: file.values["tasks"][task.name]}})
        return apart(task, result.tasks[task.name], found[task.name], texts, rewritten=texts.rewritten(task))

    for task in tasks:
        identity = _digest(_values(task), request.max_new_tokens, request.add_bos, texts.fingerprints)
        # Every rank reads its part of the documents, as it does of prompts.
        size = texts.documents if task is tasks[0] else 0
        yield Part(
            section="training_texts",
            name=task.name,
            identity=identity,
            size=size,
            compute=partial(compute, task),
        )


def _read_texts(paths: Sequence[Path]) -> dict[str, str]:
    """Texts by file name, under which they stand in the result file."""
    texts: dict[str, str] = {}
    for path in paths:
        if path.name in texts:
            raise UserError(
                f"--retention {path}: another text is named {path.name} too, and the result file lists texts by their "
                "names; rename one"
            )
        texts[path.name] = _read_text(path)
    return texts


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--retention {path}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise UserError(f"--retention {path}: the file is empty")
    return text


def _retention_parts(
    request: Request, share: PromptShare, texts: Mapping[str, str], window: int, load: Load
) -> Iterator[Part]:
    """The perplexity of every retention text, under the base model first."""
    share = replace(share, batch_size=_WINDOWS_PER_BATCH)
    models = (("retention_before", "--base", request.base), ("retention", "--model", request.model))
    for section, option, path in models:
        if path is None:
            continue
        for name, text in texts.items():
            identity = _digest(weights_stamp(path), text, window, request.add_bos)
            compute = partial(_perplexity, request, share, text, window, partial(load, path, option))
            yield Part(section=section, name=name, identity=identity, size=0, compute=compute)


def _perplexity(
    request: Request, share: PromptShare, text: str, window: int, load: Callable[[], tuple[Any, Any]]
) -> dict[str, Any] | None:
    model, tokenizer = load()
    result = text_perplexity(model, tokenizer, text, window=window, add_bos=request.add_bos, share=share)
    return None if result is None else asdict(result)


def _recipe_text_parts(
    request: Request, share: PromptShare, texts: Sequence[RetentionText], load: Load
) -> Iterator[Part]:
    """The perplexity of every text of the recipe, as during training; `times`, beside the start model, is not known."""
    share = replace(share, batch_size=_WINDOWS_PER_BATCH)

    def compute(text: RetentionText) -> dict[str, Any] | None:
        model, _ = load(request.model, "--model")
        found = measure(model, [text], {}, share)
        return None if found is None else found[text.spec.name]

    for text in texts:
        yield Part(
            section="texts",
            name=text.spec.name,
            identity=text.identity,
            size=0,
            compute=partial(compute, text),
        )


def _read_held_out(request: Request, trained: Sequence[TokenStore], share: PromptShare) -> list[HeldOutStore]:
    """The recipe's held-out stores, as its objectives read them; `trained`: the stores that --train names.

    Raises `UserError` as `read_held_out` does, and for a model that has another attention than those that are trained.
    """
    recipe = request.recipe
    if recipe is None or not recipe.evaluation.held_out:
        return []
    check_held_out(recipe, verify="once" if share.is_first else "structure")
    config = config_at(request.model)
    try:
        check_attention(config, longest_document=recipe.data.capacity)
    except UserError as error:
        raise UserError(
            f"--model {request.model}: held-out losses are measured with the attention of training: {error}"
        ) from None
    tokens = token_roles(request.tokenizer, vocabulary=config.vocab_size)
    objectives = build_objectives(recipe.objectives, tokens)
    return read_held_out(recipe, request.tokenizer, trained, objectives, vocabulary=config.vocab_size)


def _held_out_parts(
    request: Request, share: PromptShare, stores: Sequence[HeldOutStore], load: Load
) -> Iterator[Part]:
    """The loss of every held-out store, as during training.

    They come after all that the model itself is asked, because it is changed in place: no memory is needed for a second one.
    """
    recipe = request.recipe

    @cache
    def trained() -> tuple[TrainableModel, LayoutPolicy | None]:
        assert recipe is not None, "the stores are of its evaluation.tasks"
        causal_lm, _ = load(request.model, "--model")
        rows, longest = recipe.model.loss_chunk_rows, recipe.data.capacity
        model = as_trained(causal_lm, longest_document=longest, loss_chunk_rows=rows)
        head_dim = causal_lm.model.layers[0].self_attn.head_dim
        backend = resolve("auto", causal_lm.dtype, head_dim, share.device)
        return model, backend and backend.policy

    def compute(store: HeldOutStore) -> dict[str, Any] | None:
        model, policy = trained()
        found = held_out_loss.measure(model, [store], share, policy)
        return None if found is None else found[store.spec.name]

    for store in stores:
        yield Part(
            section="held_out",
            name=store.spec.name,
            identity=_digest({name: batches.identity for name, batches in store.batches.items()}),
            size=sum(batches.count for batches in store.batches.values()),
            compute=partial(compute, store),
        )


def _read_instructions(request: Request) -> list[Instruction]:
    """The prompts for both models, whose token ids must mean the same. Raises `UserError` as `read_instructions` does."""
    if request.instructions is None:
        return []
    assert request.base is not None, "the command asks for both"
    tokenizer, context = load_tokenizer_and_context(request.model)
    base_tokenizer, base_context = load_tokenizer_and_context(request.base, option="--base")
    if base_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--base {request.base}: another vocabulary than {request.model} has: answers are compared token by token, "
            "which needs the model that this one was fine-tuned from"
        )
    return read_instructions(
        request.instructions,
        tokenizer,
        add_bos=request.add_bos,
        new_tokens=request.max_new_tokens,
        context=min((size for size in (context, base_context) if size is not None), default=None),
    )


def _answer_parts(
    request: Request, share: PromptShare, instructions: Sequence[Instruction], load: Load
) -> Iterator[Part]:
    """The base's answers to the instructions."""
    base = request.base
    if request.instructions is None or base is None:
        return

    def compute() -> dict[str, Any] | None:
        model, tokenizer = load(base, "--base")
        return answers_of_base(
            model, tokenizer, instructions, max_new_tokens=request.max_new_tokens, share=share
        )

    yield Part(
        section="base_answers",
        name=request.instructions.name,
        identity=_answers_identity(request, instructions),
        size=3 * len(instructions),  # generated once, scored twice
        compute=compute,
    )


def _agreement_parts(
    request: Request, share: PromptShare, instructions: Sequence[Instruction], load: Load, file: ResultFile
) -> Iterator[Part]:
    """How far the model agrees with the base's answers, which the file holds by then."""
    if request.instructions is None:
        return
    name = request.instructions.name

    def compute() -> dict[str, Any] | None:
        model, tokenizer = load(request.model, "--model")
        base = file.values["base_answers"][name]
        return agreement(model, tokenizer, instructions, base, share)

    yield Part(
        section="agreement",
        name=name,
        identity=_digest(_answers_identity(request, instructions), request.stops),
        size=3 * len(instructions),
        compute=compute,
    )


def _answers_identity(request: Request, instructions: Sequence[Instruction]) -> str:
    assert request.base is not None
    stops = stop_ids(load_generation_config(request.base), load_tokenizer(request.base))
    return _digest(
        weights_stamp(request.base),
        [[instruction.text, list(instruction.ids)] for instruction in instructions],
        request.max_new_tokens,
        stops,
    )


def _task_identity(task: Task, *options: Any) -> str:
    # The digest's key is `examples`, so that a part which version 0.1.0 computed is recognised.
    values = {"examples" if key == "questions" else key: value for key, value in _values(task).items()}
    for question in values["examples"]:
        del question["subjects"], question["paraphrases"]  # no answer or score depends on them
    return _digest(values, *options)


def _values(task: Task) -> dict[str, Any]:
    """What is in a task's identities; of one whose metric nobody chose, that of earlier versions."""
    values = asdict(task)
    if task.metric is None:
        del values["metric"]
    return values


def _choice_identity(task: Task, request: Request) -> str:
    # Which answers count as wrong depends on the rules of comparison, but for ASCII texts.
    answers = "".join(answer for question in task.questions for answer in question.right_answers)
    rules = () if answers.isascii() else (SCORING_VERSION,)
    return _task_identity(task, request.others, request.add_bos, *rules)


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()[:16]
