"""Settings that every test shares."""
from hypothesis import settings

settings.register_profile("metalstep", deadline=None, derandomize=True)
settings.load_profile("metalstep")
