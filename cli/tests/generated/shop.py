"""Calls the service `shop.v2`. For Python 3.11 and later.

Written by `hopline generate python` from its schema: generate it anew instead of changing it.
"""

from __future__ import annotations

import typing as t

Kind: t.TypeAlias = t.Union[t.Literal["Book"], t.Literal["Food"]]

Line = t.TypedDict("Line", {
    "extra": "t.NotRequired[t.Optional[Line]]",
    "size": "t.List[t.Any]",
    "type": "Kind",
    "unitPrice": "int",
})

Order = t.TypedDict("Order", {
    "express": "t.NotRequired[bool]",
    "labels": "t.Dict[str, int]",
    "lines": "t.List[Line]",
    "note": "t.NotRequired[t.Optional[str]]",
})

ShopError__TooMuch = t.TypedDict("ShopError__TooMuch", {"TooMuch": "ShopErrorTooMuch"})

ShopError__Unknown = t.TypedDict("ShopError__Unknown", {"Unknown": "str"})

ShopError: t.TypeAlias = t.Union[t.Literal["Closed"], ShopError__TooMuch, ShopError__Unknown]

ShopErrorTooMuch = t.TypedDict("ShopErrorTooMuch", {
    "limit": "int",
})


class Transport(t.Protocol):
    """Makes the calls, by docs/wire.md of Hopline. It raises the errors, the method's own ones among them."""

    def call(self, service: str, method: str, /, *arguments: t.Any) -> t.Any: ...

    def oneway(self, service: str, method: str, /, *arguments: t.Any) -> t.Any: ...


class ShopClient:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def add(self, a: int, b: int) -> int:
        return t.cast("int", self._transport.call("shop.v2", "add", a, b))

    def last_order(self) -> t.Optional[Order]:
        return t.cast("t.Optional[Order]", self._transport.call("shop.v2", "last-order"))

    def note(self, line: str) -> None:
        self._transport.oneway("shop.v2", "note", line)

    def total(self, order: Order, discount: t.Optional[int] = None) -> int:
        return t.cast("int", self._transport.call("shop.v2", "total", order, discount))

    # `opaque` is left out: its types have no schema.
