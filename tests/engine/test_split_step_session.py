"""Steps that somebody else schedules, on a device whose memory the host does not see."""
from split_memory import split_memory  # noqa: F401
from test_step_session import *  # noqa: F403
