"""Targets that do to their memory all that userfaultfd has events for, at random, while it is
served: tests/programs/events.c says what, and what each page must hold; tests/events.py how they
are driven.

Each run draws new seeds, and prints them. A run that failed is repeated by the command it prints.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import events
import pytest
import support
from events import PLANS, Plan

SEED = int(os.environ.get("PAGEKIT_SEED", random.randrange(1 << 30)))


@pytest.fixture
def place() -> Iterator[Path]:
    support.need_userfaultfd()
    with support.reachable_directory() as directory:
        yield directory


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_at_random(plan: Plan, place: Path) -> None:
    """Several targets at once, verified by themselves, by the engine's map, and from outside."""
    print(f"again: {events.again(plan, SEED)}")
    done = events.run(plan, place, SEED)
    assert done["checked"] and done["writes"] and done["removed"], done
