"""The commands of nanodisp. Each explains its keys with --help.

In a clone:
  python train.py                      pre-train a model, or many (-m)
  python sample.py                     text from a checkpoint
  python data/<name>/prepare.py        prepare a data set before training

Everywhere:
  python -m nanodisp.report            a page about a folder of runs
  python -m nanodisp.condensation      how far a model's embeddings have condensed, layer by layer
  python -m nanodisp.explore           a page to see embeddings condense, step by step and layer by layer
  python -m nanodisp.evaluate          benchmarks of lm-evaluation-harness
  python -m nanodisp.runs              a run as one checksummed file, and back
  python -m nanodisp.hf                export to and import from Hugging Face
  python -m nanodisp.data.tokenizer    train a vocabulary on your own text
  python -m nanodisp.data.shards       verify the checksums of prepared shards

`from nanodisp import DispersionLoss` is the loss for your own training loop. README.md has examples.
"""

from nanodisp import cli

cli.attempt(lambda: print((__doc__ or "").strip()))
