"""Where this engine keeps what it made itself; any file in it may be deleted."""

from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    return platformdirs.user_cache_path("answer")
