"""Environments: what answers the policy's turns, such as a tool, a game or a teacher that lets it try again."""

from lightrft_lightning.environments.base import ENVIRONMENTS, Environment, Observation, Turn
from lightrft_lightning.environments.calculator import Calculator
from lightrft_lightning.environments.episodes import Episodes

__all__ = ["ENVIRONMENTS", "Calculator", "Environment", "Episodes", "Observation", "Turn"]
