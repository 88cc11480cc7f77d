"""The command `answer`: its first word picks a program, without one it is a chat."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

# word -> (module, its main function, what it does)
COMMANDS = {
    "chat": ("chat", "main", "talk to a model, or answer one prompt and leave"),
    "serve": ("engine.server.command", "main", "serve a model over HTTP, as OpenAI's API has it"),
    "convert": ("weights.convert", "main", "make a weights file of a model"),
    "inspect": ("weights.inspect", "main", "show what a weights file holds, and check all of it"),
    "bench": ("engine.bench", "main", "measure speed"),
    "evaluate": ("engine.evaluate", "main", "measure quality against the unconverted model"),
    "plot": ("engine.draw", "main", "draw what these two have measured"),
    "list": ("weights.models", "list_main", "show the models in the cache"),
    "rm": ("weights.models", "rm_main", "delete a model from the cache"),
}
_LIST = "\n".join(f"  {word:10}{what}" for word, (_, _, what) in COMMANDS.items())
HELP = f"""\
usage: answer [COMMAND] ...

Language models whose weights stay entropy-coded in GPU memory.

{_LIST}

Without a command it is a chat. `answer COMMAND --help` tells more of each.

a MODEL is a weights file, or what is converted once and kept in the cache:
  smollm2                           the default
  HuggingFaceTB/SmolLM2-360M        of the Hugging Face hub; @REVISION, :Q8_0 for a GGUF file
  path/to/folder, path/to/it.gguf   a folder of the hub's kind, a GGUF file

examples:
  answer -p "Why is the sky blue?"
  answer chat HuggingFaceTB/SmolLM2-1.7B-Instruct --bits 4
  answer serve --port 8080
  answer convert model.gguf model.safetensors --bits 4.5
  answer list --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command that is picked."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["--help"], ["-h"]) or words == ["help"]:
        print(HELP, end="")
        return 0
    word = words.pop(0) if words and words[0] in COMMANDS else "chat"
    module, function, _ = COMMANDS[word]
    command = getattr(import_module(module), function)  # late: --help loads no GPU library
    try:
        code: int = command(words)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE
    return code


if __name__ == "__main__":
    sys.exit(main())
