"""Asynchronous RL post-training of language models by online policy mirror descent."""
