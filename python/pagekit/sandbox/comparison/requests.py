"""What guests are asked in a comparison, and whether they answer right.

The code that runs in a guest is run here too, on a copy of the guest's ``data``: the answers have
to be the same.
"""

from __future__ import annotations

import array
import base64
import random
from dataclasses import dataclass

from ...errors import IntegrityError
from ..guest_agent import DATA_PAGES, PAGE_SIZE, make_data

_OFFSETS = 32  # data_page() repeats itself after that many bytes

SOME_PAGES = DATA_PAGES * 85 // 100
"""How many pages of ``data`` a request for some of them touches."""

_COMPUTATIONS = (
    "sum(map(operator.mul, touched, range(len(touched))))",
    "zlib.crc32(bytes(touched))",
    "sum(touched)",
)


@dataclass(frozen=True)
class Request:
    """Code for a guest, and the answer that is right."""

    code: str
    expected: str


class Requests:
    """Makes requests, and checks answers.

    Attributes:
        checked: how many answers were right. None was wrong: that raises.
    """

    def __init__(self) -> None:
        self.checked = 0
        self._data = make_data()

    def every_page(self, number: int | None = None) -> Request:
        """A request that touches every page of ``data`` from first to last.

        Args:
            number: makes it differ from others; random if None.
        """
        offset = random.randrange(_OFFSETS) if number is None else number % _OFFSETS
        factor = 1 if number is None else number + 1
        return self._request(f"result = {factor} * sum(data[{offset}::{PAGE_SIZE}])")

    def some_pages(self, seed: int) -> Request:
        """A request that touches :data:`SOME_PAGES` pages of ``data``.

        The seed decides which ones, in which order, where in each page, and what is computed of the
        bytes there: requests of neighbouring seeds have nothing of that in common.
        """
        dice = random.Random(seed)
        offset = dice.randrange(_OFFSETS)
        pages = dice.sample(range(DATA_PAGES), SOME_PAGES)
        places = array.array("I", [page * PAGE_SIZE + offset for page in pages])
        # Loops over Python's own code would be most of the time where instructions are emulated.
        return self._request(
            "import array, binascii, operator, zlib\n"
            f"places = array.array('I', binascii.a2b_base64({base64.b64encode(places)!r}))\n"
            "touched = operator.itemgetter(*places)(data)\n"
            f"result = {_COMPUTATIONS[seed % len(_COMPUTATIONS)]}\n"
        )

    def check(self, request: Request, result: str | None) -> None:
        """Count a right answer.

        Raises:
            IntegrityError: it is wrong.
        """
        if result != request.expected:
            raise IntegrityError(f"a guest answered {result} where {request.expected} is right")
        self.checked += 1

    def _request(self, code: str) -> Request:
        namespace = {"data": self._data}
        exec(code, namespace)
        return Request(code, str(namespace["result"]))
