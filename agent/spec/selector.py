"""Which nodes a selector means: `kind=compute,tag.zone=a`. Every term has to hold; `*` in a value stands for anything.

The keys are `kind`, `node` (a name, or an id of 16 hex digits) and `tag.KEY`. A tag that a node doesn't have is not
matched by any value, `*` included. A console runs no daemons unless a term on `kind` or `node` asks for it: an empty
selector is every node but those of kind console.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from discovery.errors import LocalError
from discovery.identity import id_text

CONSOLE = "console"
TERMS_MAX = 32


class Matched(Protocol):
    """What a selector looks at in a node."""

    @property
    def id(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def tags(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Term:
    """One `key=value`."""

    key: str
    value: str

    def holds(self, node: Matched) -> bool:
        match self.key:
            case "kind":
                return _fits(self.value, node.kind)
            case "node":
                return _fits(self.value, node.name) or _fits(self.value, id_text(node.id))
            case _:
                word = node.tags.get(self.key.removeprefix("tag."))
                return word is not None and _fits(self.value, word)


@dataclass(frozen=True)
class Selector:
    """The terms of a selector, all of which have to hold."""

    terms: tuple[Term, ...] = ()

    @property
    def one(self) -> bool:
        """Whether it names a single node."""
        return any(term.key == "node" and "*" not in term.value for term in self.terms)

    def matches(self, node: Matched) -> bool:
        if node.kind == CONSOLE and not any(term.key in ("kind", "node") for term in self.terms):
            return False
        return all(term.holds(node) for term in self.terms)


def read_selector(text: str) -> Selector:
    """The selector in `text`; LocalError(`why; what to do`) when it is none."""
    if not text.strip():
        return Selector()
    terms = [_term(part.strip()) for part in text.split(",")]
    if len(terms) > TERMS_MAX:
        raise LocalError(f"{len(terms)} terms; {TERMS_MAX} at most")
    seen: set[str] = set()
    for term in terms:
        if term.key in seen:
            raise LocalError(f"{term.key}= is there twice, and every term has to hold; keep one of them")
        seen.add(term.key)
    return Selector(tuple(terms))


def _term(text: str) -> Term:
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not value:
        raise LocalError(f"{text!r} is no term; write it as kind=compute, tag.zone=a or node=NAME")
    if key not in ("kind", "node") and not (key.startswith("tag.") and len(key) > 4):
        near = f"tag.{key}" if key else "kind"
        raise LocalError(f"no key {key!r}; use kind, node or tag.KEY (did you mean {near}={value}?)")
    return Term(key, value)


def _fits(pattern: str, word: str) -> bool:
    first, *others = pattern.split("*")
    if not others:
        return pattern == word
    last = others.pop()
    if not word.startswith(first) or not word.endswith(last) or len(word) < len(first) + len(last):
        return False
    at, end = len(first), len(word) - len(last)
    for part in others:
        found = word.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True
