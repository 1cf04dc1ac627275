"""Loading tokenizers, and naming them by what they do, so that a store is never read with another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bico_ds.common.errors import UserError
from bico_ds.config.paths import FolderOrHub
from bico_ds.data.tokenizer_files import AGAIN, MOST_IDS, check_tokenizer_files

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase


class Tokenizer(Protocol):
    """What we call on a tokenizer of transformers; stated as a protocol, so that no torch is imported for a type."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def pad_token_id(self) -> int | None: ...

    @property
    def unk_token_id(self) -> int | None: ...

    @property
    def all_special_ids(self) -> list[int]: ...

    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...

    def get_vocab(self) -> dict[str, int]: ...

    def __call__(
        self,
        text: str | list[str],
        *,
        add_special_tokens: bool,
        return_offsets_mapping: bool = False,
        padding: bool = False,
        truncation: bool = False,
        verbose: bool = True,
    ) -> Mapping[str, Any]:
        """Return `input_ids`, and with `return_offsets_mapping` `offset_mapping`: of one text, or one list per text."""
        ...

    def batch_decode(self, sequences: list[list[int]], *, skip_special_tokens: bool = False) -> list[str]: ...

    def save_pretrained(self, save_directory: str | Path) -> Any: ...


class FastTokenizer(Tokenizer, Protocol):
    """A `Tokenizer` with a Rust side and an end-of-text token, and what we call on it to prepare data."""

    @property
    def eos_token_id(self) -> int: ...

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer: ...

    @property
    def name_or_path(self) -> str: ...

    @property
    def padding_side(self) -> str: ...

    @property
    def clean_up_tokenization_spaces(self) -> bool: ...

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The template, or by name several, of which chats take `default`."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool = False
    ) -> Any:
        """Return the text, with `tokenize=False`."""
        ...

    def convert_ids_to_tokens(self, ids: Any) -> Any: ...

    def decode(self, token_ids: Any) -> Any:
        """Return the text of these ids."""
        ...


# These read tokenizer.json as it is; `AutoTokenizer` takes another class for some kinds of model that lie beside it.
_GENERAL_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_PROBES = (
    "The quick brown fox jumps over 12345 lazy dogs.",
    "  two  spaces,\ttab\nnewline\n\n",
    'It\'s "quoted" — naïve café, Straße, 北京, Привет, مرحبا, 🙂',
    "def f(x_1): return x_1 ** 2  # 3.14",
)


def load_tokenizer(path: FolderOrHub) -> FastTokenizer:
    """Load a tokenizer from a folder, a sentencepiece `tokenizer.model` or a hub name; always a fast one.

    Truncation and padding that the file may ask for are switched off: training texts are never cut silently. Raises
    `UserError` when there is none at `path`, its files are damaged or cannot be one's, it cannot be loaded as a fast one or
    converted exactly, or it has no end-of-text token.
    """
    local = Path(path)
    try:
        if isinstance(path, Path) and not path.exists():
            raise UserError(
                f"no tokenizer at '{path}': no such folder; fetch it there, or give a hub name (owner/name)"
            )
        if local.exists():
            check_tokenizer_files(local.parent if local.is_file() else local)
        tokenizer = _load(path, local)
        _check_usable(tokenizer)
    except UserError:
        raise
    # transformers raises OSError, ValueError and KeyError, the Rust side plain Exception, and where it panics no Exception.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        first_line = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot load a tokenizer from '{path}': {first_line}; {AGAIN}") from error
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _load(path: FolderOrHub, local: Path) -> PreTrainedTokenizerBase:
    if (local.name.endswith(".model") and local.is_file()) or (local / "tokenizer.model").is_file():
        folder = local.parent if local.is_file() else local
        tokenizer = (
            _load_fast(folder) if (folder / "tokenizer.json").is_file() else _load_sentencepiece(local)
        )
    elif local.exists() and not (local / "tokenizer.json").is_file():
        raise UserError(
            f"no tokenizer in '{path}': need tokenizer.json (fast) or tokenizer.model (sentencepiece)"
        )
    else:
        tokenizer = _load_fast(path)
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer '{path}' has no fast form (tokenizer.json): convert it with save_pretrained"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer '{path}' has no end-of-text (eos) token: set eos_token in tokenizer_config.json"
        )
    return tokenizer


def _load_fast(path: FolderOrHub) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    from bico_ds.model.model_folder import warn_once

    config = get_tokenizer_config(str(path))
    names_code = "auto_map" in config
    loader = PreTrainedTokenizerFast if config.get("tokenizer_class") in _GENERAL_CLASSES else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:
        if not names_code:
            raise
        raise UserError(
            f"cannot load a tokenizer from '{path}': auto_map in its tokenizer_config.json names code for it, and code from "
            "a folder is never run; with a tokenizer.json, set tokenizer_class there to PreTrainedTokenizerFast and remove "
            "auto_map"
        ) from error
    if names_code:
        warn_once(
            f"'{path}': auto_map in its tokenizer_config.json names code, which is not run: it is read as "
            f"{type(tokenizer).__name__}"
        )
    return tokenizer


def _check_usable(tokenizer: FastTokenizer) -> None:
    """Raise `UserError`, or what the tokenizer raises in use, for mistakes in its files that show no earlier."""
    size, name = vocabulary_size(tokenizer), tokenizer.name_or_path
    if not 0 < size <= MOST_IDS:
        raise UserError(
            f"tokenizer '{name}' has ids up to {size - 1:,}, and {MOST_IDS:,} ids are the most: {AGAIN}"
        )
    for index in (*special_ids(tokenizer), tokenizer.eos_token_id):
        if type(index) is not int or not 0 <= index < size:
            raise UserError(
                f"tokenizer '{name}' has a special token that is none of its vocabulary (id {index}): {AGAIN}"
            )
    for probe in _PROBES:
        tokenizer(probe, add_special_tokens=False)


def _load_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    """Load a bare sentencepiece model, and compare it with sentencepiece itself.

    `AutoTokenizer` guesses a class without configuration and loses the leading-space rule (seen: 'H' for '▁H').
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    file = path if path.is_file() else path / "tokenizer.model"
    try:
        reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
        tokenizer = LlamaTokenizer.from_pretrained(str(file.parent), trust_remote_code=False)
    except Exception as error:  # protobuf, sentencepiece and transformers each raise their own
        raise UserError(
            f"cannot load a sentencepiece model from '{file}': {error!s:.300}; {AGAIN}"
        ) from error
    # Without leading spaces, of which transformers drops one more than sentencepiece.
    for probe in map(str.lstrip, _PROBES[:2]):
        ours = tokenizer(probe, add_special_tokens=False)["input_ids"]
        if ours != reference.encode(probe):
            raise UserError(
                f"'{file}' does not convert exactly to a fast tokenizer (differs on {probe!r}): "
                "give the folder with its tokenizer.json"
            )
    return tokenizer


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Return a name for what the tokenizer does: vocabulary, special tokens, and the ids of a few probe texts.

    The serialised tokenizer.json cannot serve: its text changes between versions of `tokenizers`.
    """
    ids = [
        tokenizer(p, add_special_tokens=False, padding=False, truncation=False)["input_ids"] for p in _PROBES
    ]
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": sorted(special_ids(tokenizer)),
        "bos_eos": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "probes": ids,
    }
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:32]


def tokenizer_digest(tokenizer: FastTokenizer, *, chat: bool) -> str:
    """Return a name for every rule by which the tokenizer splits texts and, with `chat`, for its chat template.

    For caches only: another version of `tokenizers` may write the same rules in another way. Then a cache makes its content
    anew; with `tokenizer_hash`, whose probes may miss a change of rules, it could give back the wrong one. The
    post-processor does not count: data preparation puts in BOS and EOS itself, and an export has another one than its base.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    del rules["post_processor"]
    content = [rules, tokenizer.chat_template if chat else None]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def legacy_tokenizer_digest(tokenizer: FastTokenizer, *, chat: bool) -> str:
    """Return the `tokenizer_digest` of earlier versions, by which their caches are named."""
    content = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template if chat else None]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def text_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Return the ids of a text, without BOS and EOS. Raises `UserError` where a part of it is unknown to the tokenizer."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    written_out = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    for token, (start, end) in zip(ids, spans, strict=True):
        if token == tokenizer.unk_token_id and text[start:end].strip() != written_out.get(token):
            raise UserError(
                f"the tokenizer has no token for '{text[start:end]}' in the text '{text}': write it in other words"
            )
    return tuple(ids)


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that are never text: BOS, EOS, padding, unknown, and every added token marked special."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(tokenizer.all_special_ids) | frozenset(added)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return one more than the largest id; added tokens may leave gaps, so `len` is no bound."""
    return max(tokenizer.get_vocab().values()) + 1


def needed_vocabulary(tokenizer: Tokenizer, embedded: int) -> int:
    """Return how many ids a model that embeds `embedded` must have for this tokenizer: its `vocabulary_size`, or less.

    Special tokens past the model's ids do not count, but for BOS, EOS and unknown, as a padding token that was added later:
    no text needs them. Texts that hold one all the same must be refused where they are tokenized.
    """
    size = vocabulary_size(tokenizer)
    past = {index for index in tokenizer.get_vocab().values() if index >= embedded}
    needed = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    return embedded if past and past <= special_ids(tokenizer) - needed else size


def word_boundaries(tokenizer: FastTokenizer) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return two tables [vocabulary]: tokens that begin with white space, and tokens that end with it.

    Token i of a text starts a word when it begins with white space or the token before it ends with white space. In a
    vocabulary of whole words every token counts as beginning with it. Special tokens are words of their own.
    """
    size = vocabulary_size(tokenizer)
    begins, ends = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    whole_words = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"] == "WordLevel"
    spaces = "Ġ▁ĊĉčĠ \n\t\r"
    blank_bytes = {"<0x0A>", "<0x09>", "<0x0D>", "<0x20>"}
    for token, index in tokenizer.get_vocab().items():
        begins[index] = whole_words or token[:1] in spaces or token in blank_bytes
        ends[index] = token[-1:] in spaces or token in blank_bytes
    special = sorted(special_ids(tokenizer))
    begins[special] = ends[special] = True
    return begins, ends
