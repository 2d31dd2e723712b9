"""Calls the service `Result.v3`. For Python 3.11 and later.

Written by `hopline generate python` from its schema: generate it anew instead of changing it.
"""

from __future__ import annotations

import typing as t

Empty: t.TypeAlias = "t.Any"

Error2__None = t.TypedDict("Error2__None", {"None": "Error2None"})

Error2: t.TypeAlias = t.Union[t.Literal["Self"], t.Literal["self"], t.Literal["\"\n"], Error2__None]

Error2None = t.TypedDict("Error2None", {
    "x": "Error2",
})

ImportOs = t.TypedDict("ImportOs", {
    "\"}\n\u202e${x}\\": "str",
    "Type": "t.NotRequired[float]",
    "inline": "t.NotRequired[ImportOsInline]",
    "self": "String2",
    "type": "t.Optional[int]",
})

ImportOsInline = t.TypedDict("ImportOsInline", {
    "deep": "t.NotRequired[t.List[t.Any]]",
})

Pair: t.TypeAlias = "t.List[t.Any]"

ResultClient: t.TypeAlias = "t.Any"

Round: t.TypeAlias = "t.Any"

Round2: t.TypeAlias = "t.List[Round]"

String2 = t.TypedDict("String2", {
    "next": "t.Optional[String2]",
    "pair": "t.NotRequired[Pair]",
})

Tagged: t.TypeAlias = "t.Any"

Transport2 = t.TypedDict("Transport2", {
})


class Transport(t.Protocol):
    """Makes the calls, by docs/wire.md of Hopline. It raises the errors, the method's own ones among them."""

    def call(self, service: str, method: str, /, *arguments: t.Any) -> t.Any: ...

    def oneway(self, service: str, method: str, /, *arguments: t.Any) -> t.Any: ...


class ResultServiceClient:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def new(self, self2: str, t2: String2, x_i64_fn_evil: ImportOs, value: t.Any) -> Round:
        return t.cast("Round", self._transport.call("Result.v3", "new", self2, t2, x_i64_fn_evil, value))

    def init(self) -> None:
        self._transport.oneway("Result.v3", "__init__")

    def constructor(self, class2: bool) -> t.Any:
        return t.cast("t.Any", self._transport.call("Result.v3", "constructor", class2))

    def a_b(self) -> None:
        self._transport.call("Result.v3", "a-b")

    def a_b2(self) -> None:
        self._transport.call("Result.v3", "a_b")

    def type2(self) -> t.Optional[str]:
        return t.cast("t.Optional[str]", self._transport.call("Result.v3", "type"))

    # `many` is left out: it has more than 16 parameters.

    # `opaque` is left out: its types have no schema.
