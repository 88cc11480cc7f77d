"""A model of the Hugging Face hub by its name, downloaded by `huggingface_hub` into its cache.

The library resumes what was stopped, shows progress, takes the token of `hf auth login` or
HF_TOKEN, and gives what it has where there is no network.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from engine.errors import WeightsError
from weights.sources.gguf import open_gguf
from weights.sources.huggingface import open_folder
from weights.sources.source import Source

_WORD = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(rf"({_WORD}/{_WORD})(?:@({_WORD}(?:/{_WORD})*))?(?::({_WORD}))?")
_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
]


@dataclass(frozen=True)
class HubName:
    """`OWNER/NAME`, with `@REVISION` a branch, tag or commit, with `:KIND` a GGUF file in it."""

    repository: str
    revision: str | None
    kind: str | None  # in the GGUF file's name, as Q8_0; None: safetensors

    @property
    def file_name(self) -> str:
        """All of it, fit for a file name."""
        parts = (self.repository.replace("/", "--"), self.revision, self.kind)
        return "-".join(part.replace("/", "--") for part in parts if part)


def parse_hub_name(spec: str) -> HubName | None:
    """None for what cannot be the name of a repository."""
    found = _NAME.fullmatch(spec)
    if found is None or spec.endswith((".gguf", ".safetensors")):
        return None
    return HubName(*found.groups())


def open_hub(name: HubName) -> Source:
    """Downloads what is not there yet. WeightsError says why it cannot be had."""
    folder = _download(name)
    if name.kind is None:
        source = open_folder(folder)
    else:
        files = sorted(folder.rglob("*.gguf"))
        matching = [path for path in files if name.kind.lower() in path.name.lower()]
        if len(matching) != 1:
            found = ", ".join(path.name for path in matching) or "none"
            raise WeightsError(
                f"{name.repository}: expected one GGUF file named after {name.kind}, found {found}"
            )
        source = open_gguf(matching[0])
    return dataclasses.replace(source, name=name.file_name)


def _download(name: HubName) -> Path:
    """The folder of the repository's files, as far as they are wanted."""
    from huggingface_hub import errors, snapshot_download  # late: half a second, and seldom used

    patterns = _FILES
    if name.kind is not None:
        patterns = [f"*{kind}*.gguf" for kind in {name.kind, name.kind.lower(), name.kind.upper()}]
    where = f"{name.repository} on the Hugging Face hub"
    try:
        return Path(
            snapshot_download(name.repository, revision=name.revision, allow_patterns=patterns)
        )
    except errors.GatedRepoError:
        problem = (
            f"{where}: its owner asks who you are; accept the terms on its page, then log in with "
            f"`hf auth login` or set HF_TOKEN"
        )
    except errors.RepositoryNotFoundError:
        problem = (
            f"{where}: no such repository, or a private one, for which `hf auth login` or HF_TOKEN "
            f"is needed; and there is no such file or folder here"
        )
    except errors.RevisionNotFoundError:
        problem = f"{where}: has no revision {name.revision!r}"
    except errors.LocalEntryNotFoundError:
        problem = f"{where}: not downloaded yet, and the hub cannot be reached"
    except Exception as error:  # of any of the libraries that it is built on
        reason = str(error).strip().splitlines() or [type(error).__name__]
        problem = f"{where}: cannot be downloaded ({reason[0]}); run it again to go on"
    raise WeightsError(problem)
