"""Maps: memory of this process that fills itself."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, SupportsIndex, overload

from ._closing import Closing
from ._native import core
from .callback import Callback
from .errors import UsageError
from .template import PAGE_SIZE, Template

if TYPE_CHECKING:
    from typing_extensions import Buffer

Faults = Literal["auto", "thread", "signal"]

_Core: Any = core().Map


class Map(_Core, Closing):  # type: ignore[misc]
    """A buffer whose pages arrive as they are touched. Made by :func:`pagekit.map`.

    It is a buffer as ``bytes`` is (``bytearray``, if it is writable): ``memoryview(m)``,
    ``numpy.frombuffer(m)``, ``re.search(pattern, m)``, ``m[i]``, ``m[a:b]``, ``len(m)``.

    **What cannot be had.** Methods and subscripts of a map ask the source first, and raise its
    error. A view of the map (a ``memoryview``, an array, a regular expression at work) cannot: a
    thread that touches a lost page there gets SIGBUS, which ends the process with a line on stderr
    that names the page and the reason. It never reads zeros instead, and never waits for ever.

    **Threads.** Everything may be used from any thread. Methods give up the GIL while they wait. A
    view that waits for a page keeps it, if whoever touches it does; pages arrive all the same.

    **Children.** After ``os.fork`` (and in ``multiprocessing`` processes that fork) the map and its
    views work in the child, with what was written until then; the process that made the map goes on
    to bring pages, and when it is gone, missing ones raise SIGBUS. Maps of huge pages are not in
    children. A child that a bare ``clone`` made, bypassing ``fork``, gets SIGSEGV.
    """

    if TYPE_CHECKING:

        def __buffer__(self, flags: int, /) -> memoryview: ...

    def __new__(
        cls,
        source: str | Callback | Template,
        *,
        size: int | None = None,
        layers: Sequence[str] = (),
        writable: bool = False,
        faults: Faults = "auto",
        page_size: int = PAGE_SIZE,
        deadline: float = 5.0,
    ) -> Self:
        if isinstance(source, Template):
            if layers or size is not None:
                raise UsageError(
                    "layers and a size are a source's, and a template has its own",
                    hint="give them to pagekit.Template",
                )
            template = source
        else:
            template = Template(source, size=size, layers=layers, deadline=deadline)
        self: Self = super().__new__(cls, template._core, writable, faults, page_size)
        self._spec = template.spec
        self._writable = writable
        return self

    @property
    def writable(self) -> bool:
        """Whether it can be written. What is written stays in this process, and in this map."""
        return bool(self._writable)

    @property
    def closed(self) -> bool:
        """Whether it was closed. Views of it may still be there."""
        return bool(super()._closed())

    def __len__(self) -> int:
        return int(super()._size())

    @overload
    def __getitem__(self, key: SupportsIndex, /) -> int: ...
    @overload
    def __getitem__(self, key: slice, /) -> bytes: ...
    def __getitem__(self, key: SupportsIndex | slice, /) -> int | bytes:
        """A byte, or a copy of some. Raises as :meth:`populate` does."""
        first, last, key = self._inside(key)
        super()._bring(first, last - first)
        with memoryview(self) as view:
            found = view[key]
            return found if isinstance(found, int) else bytes(found)

    def __setitem__(self, key: SupportsIndex | slice, value: SupportsIndex | Buffer, /) -> None:
        """Writes a byte, or as many as there are. Raises as :meth:`populate` does; TypeError if the
        map is read-only, ValueError if the length differs."""
        if not self._writable:
            raise TypeError("the map is read-only: pagekit.map(..., writable=True)")
        first, last, key = self._inside(key)
        super()._bring(first, last - first)
        with memoryview(self) as view:
            if isinstance(key, int):
                view[key] = value  # type: ignore[call-overload]
            else:
                with memoryview(value) as bytes_:  # type: ignore[arg-type]
                    view[key] = bytes_.cast("B")

    def _inside(self, key: SupportsIndex | slice) -> tuple[int, int, int | slice]:
        """The first and the last of the bytes meant, and which of them as ``memoryview`` has it."""
        size = len(self)
        if isinstance(key, slice):
            chosen = range(*key.indices(size))
            if not chosen:
                return 0, 0, key
            return min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1]) + 1, key
        index = operator.index(key)
        if not -size <= index < size:
            raise IndexError(f"byte {index} of a map of {size}")
        return index % size, index % size + 1, index

    def __bytes__(self) -> bytes:
        return self[:]

    def __contains__(self, part: SupportsIndex | Buffer) -> bool:
        return self.find(part) >= 0

    def find(self, part: SupportsIndex | Buffer, start: int = 0, end: int | None = None) -> int:
        """Where ``part`` (bytes, or one byte as a number) is first found from ``start`` to ``end``,
        or -1; as ``bytes.find``, but pages are brought only as far as it searches.

        Raises as :meth:`populate` does.
        """
        needle = bytes([part]) if isinstance(part, SupportsIndex) else bytes(part)
        first, last, _ = slice(start, end).indices(len(self))
        if start > len(self):
            return -1
        found = super()._search(needle, first, last) if first <= last else None
        return -1 if found is None else int(found)

    def will_need(self, start: int = 0, stop: int | None = None) -> None:
        """Begins to fetch the bytes from ``start`` to ``stop`` (the end, if None), ahead.

        It waits for nothing, and a failure is nobody's: what could not be had is asked for again
        by whoever touches it. The range is rounded outwards to pages. In a forked child nothing is
        fetched ahead.

        Raises:
            UsageError: it is not inside the map, or the map is closed.
        """
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise UsageError(f"{start} to {stop} is not inside a map of {len(self)} bytes")
        super()._fetch_ahead(start, stop - start)

    def populate(self) -> None:
        """Brings everything, and waits for it. System calls meet no missing page afterwards.

        Raises:
            SourceError: a page could not be had until the deadline.
            IntegrityError: the source was cut short, or the template is damaged.
            UsageError: the map is closed, or is not in this process.
        """
        super()._load()

    def statistics(self) -> dict[str, Any]:
        """Counters, now.

        ``faults`` says who brings pages: ``thread``, ``signal``, ``loaded`` (nobody: there is no
        userfaultfd, so everything was loaded first), ``parent`` (in a forked child) or ``absent``;
        ``kernel_faults`` whether system calls can meet missing pages (else they fail with EFAULT),
        and ``reason`` why not. ``demand_faults``: touches of missing pages; ``failures``: pages
        that could not be had, ever; ``lost_pages``: those that raise SIGBUS now; ``children``: maps
        in forked processes that this one serves; ``engine`` and ``template``: what these count.
        """
        statistics: dict[str, Any] = json.loads(super()._counters())
        if statistics["template"]:
            statistics["template"]["stack"] = dict(statistics["template"]["stack"])
        return statistics

    def close(self) -> None:
        """Closes the map: it can be used no more, but its views can, and are served, until the last
        of them is gone. Then it is unmapped. Closing twice is fine."""
        super()._close()

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> Any:
        raise TypeError(
            "a map is memory of this process and cannot be pickled: "
            "call pagekit.map in the other process, or fork"
        )

    def __repr__(self) -> str:
        state = "closed, " if self.closed else ""
        return f"Map({self._spec!r}, {state}{len(self)} bytes)"


def map(
    source: str | Callback | Template,
    *,
    size: int | None = None,
    layers: Sequence[str] = (),
    writable: bool = False,
    faults: Faults = "auto",
    page_size: int = PAGE_SIZE,
    deadline: float = 5.0,
) -> Map:
    """Maps a source into memory: a buffer whose pages arrive as they are touched.

    ::

        with pagekit.map("file:embeddings") as memory:
            vectors = numpy.frombuffer(memory, dtype="f4").reshape(-1, 768)

    Args:
        source: where the pages come from: a spec or a function, as for :class:`pagekit.Template`;
            or a template, whose pages all its maps share.
        size: bytes, with a function only.
        layers: pieces around the source, outermost first, as for :class:`pagekit.Template`.
        writable: whether the memory can be written. What is written stays in this process, and in
            this map; the source is never written.
        faults: who brings a page that is touched. ``"thread"``: a thread of this process.
            ``"signal"``: the thread itself, in a handler of SIGBUS, which is faster; but system
            calls that meet a missing page fail with EFAULT, and a thread that blocks SIGBUS is
            ended. (Install other handlers of it, :mod:`faulthandler` say, before.)
            ``"auto"`` is ``"thread"``, or loads everything first where there is no userfaultfd.
        page_size: bytes of the memory's own pages: 4096, or 2097152 from the kernel's pool of huge
            pages, which must have room for all of it.
        deadline: seconds after which a page is given up whose fetch still fails.

    Users without a right to a full userfaultfd get one for user mode only: system calls that meet a
    missing page (``os.write`` of a view, say) fail with EFAULT; :meth:`Map.populate` first. See
    ``statistics()["kernel_faults"]``, and ``pagekit doctor`` for the knob to turn.

    A function as the source runs in a helper process, which has not got the map: it cannot be
    passed there (it does not pickle), and one that waits for itself by another way is given up.

    Raises:
        UsageError: a spec that means nothing, or arguments that do not fit each other.
        PermissionDenied: ``faults`` was given, and there is no userfaultfd for it.
        Unsupported: not Linux; or no free huge pages.
        Missing: there is no such source.
        SourceError: everything has to be loaded first, and cannot be had.
    """
    return Map(
        source,
        size=size,
        layers=layers,
        writable=writable,
        faults=faults,
        page_size=page_size,
        deadline=deadline,
    )
