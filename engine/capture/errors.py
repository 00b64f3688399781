"""What capture raises."""
from __future__ import annotations


class CaptureError(NotImplementedError):
    """A model that cannot be captured, or a captured operation without a kernel; the text names model, operation and reason."""
