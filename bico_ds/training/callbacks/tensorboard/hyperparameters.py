"""TensorBoard's HPARAMS: the settings of a run.

TensorBoard compares the runs that it shows: the settings that differ come first, beside the last values of the curves in the
order of their tags. A run knows itself alone, so that it writes all its settings.
"""

from __future__ import annotations

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

from bico_ds.config.layers import entry_names, leaves, value_at
from bico_ds.config.load import recorded_values
from bico_ds.config.schema import Recipe

Setting = bool | float | str

# What a run is called is no setting, and stands beside them.
_NAMES = ("name", "description", "output_dir")
# TensorBoard compares a key only where two runs have it: what one of them lacks shows in the list of what each has.
_LISTS = (("objectives",), ("data", "sources"), ("evaluation", "tasks"))


def settings(recipe: Recipe) -> dict[str, Setting]:
    """The values of all keys of a recipe by their paths in `--set`, secrets left out.

    Lists are texts, and what is null is `null`: a key must be there to be compared.
    """
    values = recorded_values(recipe)
    found = {leaf.path: _setting(leaf.value) for leaf in leaves(values) if leaf.path not in _NAMES}
    for key in _LISTS:
        entries = value_at(key, values)
        names = zip(entries, entry_names(entries, key), strict=True)
        found[".".join(key)] = _setting([entry if isinstance(entry, str) else name for entry, name in names])
    return found


def _setting(value: object) -> Setting:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list) and value:
        return ", ".join(map(str, value))
    return "null" if value is None else str(value)


def session_start(recipe: Recipe, *, seconds: float) -> Summary.Value:
    """The settings as TensorBoard reads them; `seconds`: the time of the start since 1970.

    Without a name of a group: runs of the same settings stay runs of their own.
    """
    start = SessionStartInfo(start_time_secs=seconds)
    for name, value in settings(recipe).items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, str):
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = value
    return _value(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))


def session_end(*, seconds: float) -> Summary.Value:
    """That the run is done, at so many seconds since 1970."""
    end = SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=seconds)
    return _value(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))


def _value(tag: str, content: HParamsPluginData) -> Summary.Value:
    return Summary.Value(
        tag=tag, metadata=metadata.create_summary_metadata(content), tensor=metadata.NULL_TENSOR
    )
