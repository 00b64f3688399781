"""Sampling, on a device whose memory the host does not see."""
from split_memory import split_memory  # noqa: F401
from test_sampling_requests import *  # noqa: F403
