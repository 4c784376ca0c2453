"""What a user types gets into a script as one quoted word, or not at all.

Templates may only print `Text`, which the functions below make; a plain string in a template is an
error of ours, so that no value gets there unquoted.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterable
from typing import Any

from preprocessing.errors import InputError

# What no scheduler, shell or log file name can take for something else.
_PLAIN = re.compile(r"[A-Za-z0-9_./+=@,:-]*")
_VARIABLE = re.compile(r"\$[A-Za-z_][A-Za-z0-9_]*")
_SHELL_ACTIVE = re.compile(r'(["$`\\!])')
_QUOTABLE_IN_DIRECTIVE = re.compile(r"[\x20\x23\x25-\x5b\x5d-\x7e]*")  # printable; no " $ ! \


class Text(str):
    """Text that may stand in a script as it is."""

    __slots__ = ()


def check_typed(text: str, what: str) -> str:
    """Refuse what only looks like what was meant.

    Args:
        text: as the user typed it.
        what: name of it, for messages.

    Raises:
        InputError: a character that cannot be seen (a line break, a no-break space), or a dash in
            front that is no hyphen.
    """
    for character in text:
        if not character.isprintable():
            name = unicodedata.name(character, f"character number {ord(character)}")
            raise InputError(
                f"{what} {text!r} holds a character that cannot be printed ({name}): "
                "job scripts take none, so rename it or type it anew"
            )
    if text and text[0] != "-" and (unicodedata.category(text[0]) == "Pd" or text[0] == "\u2212"):
        raise InputError(
            f"{what} {text!r} begins with {unicodedata.name(text[0])}, not with a hyphen (-), as "
            "text copied from a document may: type it anew"
        )
    return text


def word(text: object, what: str = "argument") -> Text:
    """Quote one word for the shell, so that it stands for itself."""
    return Text(shlex.quote(check_typed(str(text), what)))


def words(texts: Iterable[object], what: str = "argument") -> Text:
    """Quote each word for the shell."""
    return Text(" ".join(word(text, what) for text in texts))


def plain(text: object, what: str) -> Text:
    """Pass what may stand in a directive.

    Raises:
        InputError: a character besides letters, digits and `_ . / + = @ , : -`, or a dash in front.
    """
    value = check_typed(str(text), what)
    if not value or not _PLAIN.fullmatch(value) or value.startswith("-"):
        raise InputError(
            f"{what} {value!r} cannot stand in a batch script's directives: these take letters, "
            "digits and _ . / + = @ , : - (not in front) only"
        )
    return Text(value)


def directive(text: str, what: str) -> Text:
    """Pass a whole directive of a site profile, as `--constraint=nvme` or `-alloc_flags "nvme"`.

    Raises:
        InputError: it does not begin with a dash, or holds a character that shells expand.
    """
    value = check_typed(text, what)
    try:
        parts = shlex.split(value)
    except ValueError as error:
        raise InputError(f"{what} {value!r}: {error}".lower()) from error
    unquoted = value.replace('"', "")
    if not parts or not value.startswith("-") or not _QUOTABLE_IN_DIRECTIVE.fullmatch(unquoted):
        raise InputError(
            f"{what} {value!r} is no directive: write options, as --constraint=nvme, in printable "
            "ASCII without $, ! and backslash"
        )
    return Text(value)


def expandable(text: str, what: str) -> Text:
    """Quote one word of a site profile; `$NAME` in it stays a variable of the job.

    Raises:
        InputError: a `$` or backquote that begins something else.
    """
    value = check_typed(text, what)
    pieces, end = [], 0
    for match in _VARIABLE.finditer(value):
        pieces += [_literal(value[end : match.start()], what), match.group()]
        end = match.end()
    pieces.append(_literal(value[end:], what))
    if len(pieces) == 1:
        return Text(shlex.quote(value))
    return Text(f'"{"".join(pieces)}"')


def command(text: str, what: str) -> Text:
    """Quote a command line of a site profile word by word; `$NAME` stays a variable of the job.

    Raises:
        InputError: a quote that does not end, or anything else that a shell would expand.
    """
    try:
        parts = shlex.split(text)
    except ValueError as error:
        raise InputError(f"{what} {text!r}: {str(error).lower()}") from error
    return Text(" ".join(expandable(part, what) for part in parts))


def only_text(value: Any) -> Any:
    """Let a template print nothing but what the functions above have made, and numbers."""
    if isinstance(value, (Text, int)):
        return value
    raise TypeError(f"a template prints {value!r}, which is not quoted")


def _literal(text: str, what: str) -> str:
    if "$" in text or "`" in text:
        raise InputError(
            f"{what} {text!r}: a site profile may use variables as $NAME, and nothing else that a "
            "shell would expand"
        )
    return _SHELL_ACTIVE.sub(r"\\\1", text)
