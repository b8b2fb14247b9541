"""How results are shown: as JSON for programs, as tables for people."""
