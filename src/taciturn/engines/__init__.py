"""WHERE clients run: sequential, loopback (over real bytes), stacked (many clients at once), ray and flower (other
machines); the same round text.
"""

from taciturn.engines.local import LocalEngine
from taciturn.engines.modes import ENGINES, build

__all__ = ["ENGINES", "LocalEngine", "build"]
