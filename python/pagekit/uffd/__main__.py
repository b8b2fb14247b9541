"""Writes the feature table of a page in Markdown anew, or prints it::

python -m pagekit.uffd docs/userfaultfd.md
python -m pagekit.uffd
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from .._native import core

BEGIN = "<!-- begin: made by python -m pagekit.uffd docs/userfaultfd.md -->"
END = "<!-- end -->"


def page() -> str:
    """The table in Markdown, the same on every machine."""
    lines = []
    for title, bits in (("Features with a bit in the handshake", True), ("Found by trying", False)):
        lines += [f"### {title}", ""]
        head = ["bit", "feature"] if bits else ["feature"]
        head += ["since", "gives", "needs", "without it"]
        lines += [_row(head), _row(["---"] * len(head))]
        rows = [row for row in core().uffd_table() if (row[1] is not None) == bits]
        for name, bit, since, _, _, gives, needs, without in rows:
            cells = [f"`{name}`", since, gives, needs, without]
            lines.append(_row([str(bit), *cells] if bits else cells))
        lines.append("")
    lines += ["### Where they come from", "", _row(["feature", "Linux", "commit", "title"])]
    lines.append(_row(["---"] * 4))
    for name, _, since, commit, title, *_ in core().uffd_table():
        lines.append(_row([f"`{name}`", since, f"`{commit}`" if commit else "", title]))
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def rewritten(text: str) -> str:
    """A page with the table of today between its two comments."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{page()}\n{END}{after}"


def main() -> None:
    if len(sys.argv) == 1:
        sys.stdout.write(page())
        return
    path = Path(sys.argv[1])
    new = rewritten(path.read_text())
    # Whole or not at all.
    path.with_suffix(".new").write_text(new)
    path.with_suffix(".new").replace(path)


if __name__ == "__main__":
    main()
