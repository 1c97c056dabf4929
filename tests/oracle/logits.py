"""Let Transformers open folders that eejax wrote, and write down the logits it computes from them.

    python tests/oracle/logits.py TOKENS.safetensors OUT.safetensors FOLDER...

TOKENS holds one array `[T]` per folder, OUT gets one array `[T, V]` per folder, both under the folders' names. A tensor
that is missing, extra or misshaped is an error. Runs in the oracle's environment, as make_models.py does.
"""

import sys
from pathlib import Path

from make_models import logits_of, open_model
from safetensors.numpy import load_file, save_file


def main() -> None:
    tokens_file, out, *folders = map(Path, sys.argv[1:])
    tokens = load_file(tokens_file)
    save_file({folder.name: logits_of(open_model(folder), tokens[folder.name]) for folder in folders}, out)


if __name__ == "__main__":
    main()
