"""What cannot be true of an order."""

from __future__ import annotations

from ledger.errors.base import LedgerError


class OrderRefused(LedgerError):
    """Base of what contradicts what is known of an order; nothing moved."""

    code = "order_refused"


class UnknownOrder(OrderRefused):
    """No such order was placed, or not yet."""

    code = "unknown_order"

    def __init__(self, order_id: str) -> None:
        super().__init__(f"no order {order_id} was placed")
        self.order_id = order_id


class OrderReused(OrderRefused):
    """The order's id was used for another customer or amount."""

    code = "order_id_reused"

    def __init__(self, order_id: str) -> None:
        super().__init__(f"order {order_id} was placed before with other contents")
        self.order_id = order_id


class OrderNotReserved(OrderRefused):
    """A fill, an end or a second reserving of an order that was rejected: nothing was ever set aside."""

    code = "order_not_reserved"

    def __init__(self, order_id: str, why: str | None) -> None:
        super().__init__(f"order {order_id} was rejected: {why}")
        self.order_id = order_id


class OrderOverfilled(OrderRefused):
    """More than was reserved."""

    code = "order_overfilled"

    def __init__(self, order_id: str, amount: int, filled: int) -> None:
        super().__init__(f"order {order_id}: {filled} filled in all, {amount} reserved (base units)")
        self.order_id, self.amount, self.filled = order_id, amount, filled


class FillReused(OrderRefused):
    """The fill's id was used for another amount."""

    code = "fill_id_reused"

    def __init__(self, order_id: str, fill_id: str, stored: int, given: int) -> None:
        super().__init__(f"order {order_id}: fill {fill_id} is of {stored}, now {given} (base units)")
        self.order_id, self.fill_id, self.stored, self.given = order_id, fill_id, stored, given


class FillsDisagree(OrderRefused):
    """The total that the order's end told is not what its fills sum up to, or two ends told two totals."""

    code = "fills_disagree"

    def __init__(self, order_id: str, total: int, filled: int) -> None:
        super().__init__(f"order {order_id}: a total of {total} is told, {filled} is known (base units)")
        self.order_id, self.total, self.filled = order_id, total, filled
