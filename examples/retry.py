"""An environment of one's own: the policy may correct a wrong answer. Puzzles and verifiers are reasoning-gym's.

    lightrft fit --config examples/retry.yaml

After a wrong answer the verifier says so, with a hint, as the user's next message; a later right answer earns less. The
last number of a turn is its answer.
"""

from lightrft_lightning.environments import Environment, Observation, Turn
from lightrft_lightning.experience.trajectory import Prompt
from lightrft_lightning.rewards.functions import NUMBER, reasoning_gym


class Retry(Environment):
    """Lets the policy try again until the verifier's score is 1, or its turns are used up.

    Args:
        discount: what a right answer still earns with every further attempt.
        hint: whether to say how long the right answer is.
    """

    def __init__(self, discount: float = 0.7, hint: bool = True) -> None:
        if not 0 <= discount <= 1:
            raise ValueError(f"discount={discount} must be from 0 to 1")
        self.discount, self.hint = discount, hint

    def reset(self, prompt: Prompt, seed: int) -> None:
        self.entry = prompt.fields["entry"]  # what reasoning-gym made; `{task: reasoning_gym.<data set>}` brings it

    def step(self, turn: Turn) -> Observation:
        numbers = NUMBER.findall(turn.text)
        score = reasoning_gym(numbers[-1] if numbers else "", self.entry)
        earned = score * self.discount ** (turn.number - 1)
        if score == 1 or turn.last:
            return Observation(reward=earned, done=True)
        hint = f" The right answer has {len(str(self.entry['answer']))} characters." if self.hint else ""
        return Observation(f"That is wrong.{hint} Try again.")
