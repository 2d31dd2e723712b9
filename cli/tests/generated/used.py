"""Uses shop.py over a transport that answers by itself."""

import typing as t

from shop import Line, Order, ShopClient


class Answers:
    """Keeps what is called, and answers 7."""

    def __init__(self) -> None:
        self.calls: t.List[t.Tuple[t.Any, ...]] = []

    def call(self, service: str, method: str, /, *arguments: t.Any) -> t.Any:
        self.calls.append((service, method, *arguments))
        return 7

    def oneway(self, service: str, method: str, /, *arguments: t.Any) -> t.Any:
        self.calls.append((service, method, *arguments))


answers = Answers()
shop = ShopClient(answers)
line: Line = {"type": "Book", "unitPrice": 3, "size": [1.0, 2.0]}
order: Order = {"lines": [line], "labels": {}}
total: int = shop.total(order)
assert total == 7
shop.note("hello")
assert answers.calls == [("shop.v2", "total", order, None), ("shop.v2", "note", "hello")], answers.calls

# mypy reports an ignored error that is none.
shop.add(1, "x")  # type: ignore[arg-type]
wrong: Line = {"type": "Car", "unitPrice": 3, "size": [1.0, 2.0]}  # type: ignore[typeddict-item]
