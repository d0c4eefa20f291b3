"""A Hub for tests, in memory: as much of the Hub's protocol as huggingface_hub asks for, over LFS and Xet.

Standard library, and PyYAML and hf_xet, which the client brings. The fixture `hub` in conftest.py gives one and
points the client at it.
"""

from .faults import Fault
from .server import HubServer
from .storage import Repo

__all__ = ["Fault", "HubServer", "Repo"]
