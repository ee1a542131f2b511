"""What every format must keep to: for the tests of those who write one."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from bilevel.errors import InputError
from bilevel.testing.contract import ContractError
from bilevel_llm.data.format import Format
from bilevel_llm.data.rows import CHAT_ROLES, RAW_ROLES, Row, Turn


def check_format(format: Format, examples: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ContractError` naming the first example and rule that do not agree.

    examples: the fields of some rows, which should show every way of writing a row that the format knows.

    A row is recognized by its fields, and only by them; reading leaves it as it is; its turns are those of a conversation
    or of a row without a chat template, and something is learned from them; the layout names fields that there are; and
    what is written is read as the same turns.
    """
    for index, example in enumerate(examples):
        where = f"format {format.name!r}, example {index}"
        fields = dict(deepcopy(example))
        if not format.fits(fields) or format.detect(fields) <= 0:
            raise ContractError(f"{where}: the row has the fields {', '.join(fields)}, and the format does not know it")
        if format.fits({}) or format.detect({}) > 0:
            raise ContractError(f"{where}: the format takes a row without any field for its own; `required` names fields")
        turns = format.read(fields, where)
        if fields != example:
            raise ContractError(f"{where}: reading the row has changed it")
        _check_turns(turns, where)
        layout = format.layout(fields)
        hash(layout)
        if layout.format != format.name or (layout.columns and not any(name in fields for name in layout.columns)):
            raise ContractError(f"{where}: the layout {layout} with the fields {layout.columns} is not that of the row")
        try:
            written = format.write(Row(turns, where))
        except InputError:
            continue  # the format cannot write this row, and says so
        if not format.fits(written) or format.read(written, where) != turns:
            raise ContractError(f"{where}: what is written is not read as the same turns: {written}")


def _check_turns(turns: Sequence[Turn], where: str) -> None:
    roles = [turn.role for turn in turns]
    if not (set(roles) <= CHAT_ROLES or set(roles) <= RAW_ROLES):
        raise ContractError(
            f"{where}: the turns have the roles {', '.join(roles)}; all must be of {', '.join(sorted(CHAT_ROLES))}, "
            f"or all of {', '.join(sorted(RAW_ROLES))}"
        )
    learned = [turn.learned for turn in turns]
    if not any(learned):
        raise ContractError(f"{where}: nothing is learned from the turns ({', '.join(roles)})")
    if roles[0] in RAW_ROLES and learned != [False] * (len(turns) - 1) + [True]:
        raise ContractError(f"{where}: without a chat template the last turn, and it alone, must be learned")
