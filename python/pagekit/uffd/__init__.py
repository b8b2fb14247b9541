from .table import Feature, State, Support, features, lacking, support

__all__ = ["Feature", "State", "Support", "features", "lacking", "support"]
