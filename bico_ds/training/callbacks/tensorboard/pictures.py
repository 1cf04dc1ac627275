"""TensorBoard's IMAGES: scores over the steps, and which tokens of a document see which. Training waits for it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO

from tensorboard.compat.proto.summary_pb2 import Summary

from bico_ds.batch import PackedBatch
from bico_ds.data.loading.batch_view import Decode, DocumentView, plot_visibility, view_batch
from bico_ds.evaluation.report.plots import plot_curves
from bico_ds.evaluation.report.runs import ComparedRun

_DPI = 80
# Tokens of the document that is shown: fewer show little, and of more the words cannot be read.
_LEAST, _MOST = 16, 40


def curves_picture(tag: str, run: ComparedRun) -> Summary.Value:
    """The headline scores of the four tasks over the steps."""
    return _picture(tag, lambda file: plot_curves([run], file, dpi=_DPI))


def visibility_picture(tag: str, batch: PackedBatch, objective: str, decode: Decode) -> Summary.Value | None:
    """Which tokens of a document of the batch, on the CPU, see which; None where no document has two tokens."""
    document = readable_document(view_batch(batch))
    if document is None:
        return None
    mode, shown = batch.plan.mode, replace(document, tokens=document.tokens[:_MOST])
    rest = len(document.tokens) - len(shown.tokens)
    title = f"{objective}: {mode} attention" + (f", without {rest:,} more tokens" if rest else "")
    return _picture(tag, lambda file: plot_visibility(shown, mode, decode, file, title=title, dpi=_DPI))


def readable_document(documents: list[DocumentView]) -> DocumentView | None:
    """The shortest one that is long enough to show something, else the longest; None where none has two tokens."""
    documents = sorted(
        (view for view in documents if len(view.tokens) > 1), key=lambda view: len(view.tokens)
    )
    enough = (view for view in documents if len(view.tokens) >= _LEAST)
    return next(enough, documents[-1] if documents else None)


def _picture(tag: str, draw: Callable[[BinaryIO], None]) -> Summary.Value:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks
        draw(file)
    content = file.getvalue()
    # A PNG begins with 8 bytes of its own and 8 of its first chunk, which has its size.
    width, height = (int.from_bytes(content[start : start + 4], "big") for start in (16, 20))
    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=content)
    return Summary.Value(tag=tag, image=image)
