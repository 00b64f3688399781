"""Caches of limited size, on a device whose memory the host does not see."""
from split_memory import split_memory  # noqa: F401
from test_max_kv_size import *  # noqa: F403
