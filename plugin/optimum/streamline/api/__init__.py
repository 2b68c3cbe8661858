"""The Python API: `Streamliner` and its steps, the recipe as an Optimum config, and the results the steps return."""

from .config import StreamlineConfig
from .results import Artifact, Plan, Report, Scores, Verdict
from .streamliner import Streamliner

__all__ = ["Artifact", "Plan", "Report", "Scores", "StreamlineConfig", "Streamliner", "Verdict"]
