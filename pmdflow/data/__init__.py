"""What is trained and evaluated on: prompts by cursor, their text, tokens and sampling."""

from pmdflow.data.gym import GymPrompts as GymPrompts
from pmdflow.data.mixture import MixedPrompts as MixedPrompts
from pmdflow.data.prompts import PromptSource as PromptSource
from pmdflow.data.prompts import make_prompts as make_prompts
from pmdflow.data.table import TablePrompts as TablePrompts
