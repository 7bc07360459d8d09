"""Who may do what: every route with the scope that it asks for, and nothing for a route that is not listed here.

Owns the table. It is asked before a byte of the body is read, with the very routes that the application matches, so no
spelling of a path can pass the one and reach the other. Knows nothing of what a route does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from promptmux_server.api.keys import Keys, KeyScope
from promptmux_server.errors import Forbidden


@dataclass(frozen=True)
class Rule:
    """What one route asks of its caller."""

    scope: KeyScope | None
    """None: no key is needed."""
    takes_prompt: bool = False
    """The body is a prompt file, whose size has a limit of its own."""


OPEN, INFER, ADMIN = Rule(None), Rule("infer"), Rule("admin")

RULES: Mapping[tuple[str, str], Rule] = MappingProxyType(
    {
        ("GET", "/livez"): OPEN,
        ("GET", "/readyz"): OPEN,
        ("GET", "/health"): INFER,
        ("GET", "/version"): INFER,
        ("GET", "/openapi.json"): INFER,
        ("HEAD", "/openapi.json"): INFER,
        ("POST", "/v1/predict"): INFER,
        ("POST", "/v1/fanout"): INFER,
        ("GET", "/v1/tasks"): INFER,
        ("GET", "/v1/tasks/{name}"): INFER,
        ("POST", "/v1/tasks:reload"): ADMIN,
        ("GET", "/v1/prompts"): INFER,
        ("GET", "/v1/prompts/{name}"): INFER,
        ("PUT", "/v1/prompts/{name}"): Rule("admin", takes_prompt=True),
        ("DELETE", "/v1/prompts/{name}"): ADMIN,
        ("GET", "/v1/prompts/{name}/versions"): INFER,
        ("GET", "/v1/prompts/{name}/versions/{version}/file"): ADMIN,
        ("POST", "/v1/prompts/{name}/rollback"): ADMIN,
        ("POST", "/v1/prompts/{name}/pin"): ADMIN,
        ("POST", "/v1/prompts/{name}/unpin"): ADMIN,
        # A training reads files of the server, keeps its machine busy for hours, and may publish what comes of it.
        ("POST", "/v1/trainings"): ADMIN,
        ("GET", "/v1/trainings"): ADMIN,
        ("GET", "/v1/trainings/{id}"): ADMIN,
        ("DELETE", "/v1/trainings/{id}"): ADMIN,
        ("GET", "/v1/trainings/{id}/events"): ADMIN,
    }
)


class Access:
    """The table, applied to an application's routes; without keys every caller has every scope."""

    def __init__(self, routes: Sequence[BaseRoute], keys: Keys | None) -> None:
        self._routes, self._keys = routes, keys

    def check(self, scope: Scope) -> tuple[Rule, str]:
        """The rule of the route that will answer, and the name of the key that asks ("" where none is needed).

        Raises Unauthorized, or Forbidden for a key whose scope does not reach and for a route without a rule. A path
        that is no route, or has no such method, needs a key like any other: what exists is not shown to strangers.
        """
        matched, rule = self._rule(scope)
        if rule is OPEN:
            return rule, ""
        key = self._keys.identify(scope["headers"]) if self._keys is not None else None
        if matched and (rule is None or (key is not None and rule.scope not in key.scopes)):
            raise Forbidden("This key's scope does not reach this route.")
        return rule or INFER, key.name if key is not None else ""

    def _rule(self, scope: Scope) -> tuple[bool, Rule | None]:
        """Whether a route will answer, and its rule if it has one."""
        for route in self._routes:
            if route.matches(scope)[0] is Match.FULL:
                return True, RULES.get((scope["method"], getattr(route, "path", "")))
        return False, None


def allowed_methods(routes: Iterable[BaseRoute], scope: Scope) -> list[str]:
    """The methods that a path takes, sorted."""
    found = [route for route in routes if route.matches(scope)[0] is not Match.NONE]
    return sorted({method for route in found for method in getattr(route, "methods", None) or ()})
