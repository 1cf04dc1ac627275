"""`bico-ds prepare facts`: the files of the embedded task."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _SubParsersAction

from pydantic import ValidationError

from bico_ds.common.errors import UserError
from bico_ds.common.files import atomic_folder
from bico_ds.config.arguments import local_path, whole
from bico_ds.config.sections.data import FactsSpec
from bico_ds.data.prepare.facts import is_facts_folder, write_facts
from bico_ds.data.prepare.output_folder import refuse_output


def prepare_facts(options: Namespace) -> None:
    """Write the embedded task's files."""
    try:
        spec = FactsSpec(**{name: getattr(options, name) for name in FactsSpec.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--{str(first['loc'][0]).replace('_', '-')}: {first['msg']}") from None
    output = options.output.resolve()
    refuse_output(output, force=options.force, is_ours=is_facts_folder)
    try:
        with atomic_folder(output, replace=options.force) as folder:
            write_facts(spec, folder)
    except OSError as error:
        raise UserError(f"cannot write to '{output.parent}': {error.strerror}") from error
    for file in sorted(output.iterdir()):
        print(file)


def add_command(commands: _SubParsersAction[ArgumentParser]) -> None:
    parser = commands.add_parser(
        "facts", help="the embedded task: fictitious facts, their tests, a tokenizer"
    )
    parser.add_argument("--output", metavar="DIR", type=local_path, required=True, help="the folder to write")
    parser.add_argument("--force", action="store_true", help="replace such a folder at --output")
    for name, field in FactsSpec.model_fields.items():
        described = field.description or "of names, groups and fillers"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=whole,
            metavar="N",
            default=field.default,
            help=f"{described} (default: %(default)s)",
        )
