"""Embeddings of the caller's own, on a device whose memory the host does not see."""
from split_memory import split_memory  # noqa: F401
from test_input_embeddings import *  # noqa: F403
