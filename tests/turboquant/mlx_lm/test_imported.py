"""mlx-lm is imported without work that is done twice, and without a word."""

from __future__ import annotations

import json
import subprocess
import sys

from tests import ROOT

IMPORT = """
import collections, json, sys

read = collections.Counter()

def count(event, details):
    if event == "open" and "transformers/models/" in str(details[0]) and details[0].endswith(".py"):
        read[details[0]] += 1

sys.addaudithook(count)
import turboquant.mlx_lm.imported

from transformers import LlamaConfig, PreTrainedTokenizerFast

print(json.dumps(read))
"""


def test_transformers_reads_the_sources_of_its_models_once_and_misses_no_pytorch() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr == ""
    read = json.loads(done.stdout)
    assert len(read) > 1000
    assert sum(read.values()) < 1.1 * len(read)  # the sources of a model that is used are read again
