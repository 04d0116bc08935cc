"""A reward of your own; a configuration names it as `own_reward:score`.

Its parameters say what it gets: `completion`, `prompt`, `metadata` (every other key of the data) and more, see
`pmdflow/reward/README.md`. It runs in a process that is killed when it takes longer than `reward.timeout_s`.
"""


def score(*, completion, metadata):
    """1 if the last word is the answer, and a little for having said "therefore"."""
    right = completion.rstrip(" .\n").split()[-1:] == [str(metadata["answer"])]
    return float(right) + 0.1 * ("therefore" in completion.lower())
