"""What a run needs, before anything is loaded: `lightrft plan`."""

from lightrft_lightning.planning.machine import Machine, this_machine
from lightrft_lightning.planning.predict import Phase, Plan, alternatives, predict
from lightrft_lightning.planning.settings import Planned, of_config

__all__ = ["Machine", "Phase", "Plan", "Planned", "alternatives", "of_config", "predict", "this_machine"]
