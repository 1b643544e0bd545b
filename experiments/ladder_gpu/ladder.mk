# The ladder for one H100: 1,300 steps of 65,536 tokens, 85M tokens, a bar. Not run on a GPU yet.
#
#   make ladder LADDER_SET=experiments/ladder_gpu LADDER=out/ladder_gpu sources=~/site-packages ...
#
# At half of the data sheet's roof (python -m bench.cost), large trains 251k tokens/s and small
# 637k: 340 s and 134 s a bar, and a minute or two to score it.
#
# Beside torch and triton the machine needs sentencepiece, tqdm, safetensors, matplotlib,
# scikit-learn and zstandard. Where it cannot install them, carry wheels for its Python:
#   pip download --python-version 3.12 --only-binary=:all: -d wheels zstandard sentencepiece ...
#   pip install --no-index --find-links wheels --target out/packages zstandard sentencepiece ...
#   PYTHONPATH=out/packages make ladder PYTHON=python3 LADDER_SET=experiments/ladder_gpu ...
# The data may be made elsewhere: copy OUT/data and OUT/commands with their times (cp -a, rsync -a).
bars := \
  raw-small-s0 raw-small-s1 filtered-small-s0 classified-small-s0 textbooks-small-s0 \
  textbooks-small-s1 base-small-s0 exercises-small-s0 exercises-small-s1 varied-small-s0 \
  damaged-small-s0 pruned95-small-s0 pruned90-small-s0 pruned85-small-s0 pruned80-small-s0 \
  pairs-small-s0 raw-large-s0 filtered-large-s0 classified-large-s0 textbooks-large-s0 \
  base-large-s0 exercises-large-s0 varied-large-s0 damaged-large-s0 pruned80-large-s0
threads        := 8
base_steps     := 700
finetune_steps := 600

# 85M tokens are about 300 MB of code: with less, the model sees some of it more than once.
# The installed packages are hundreds of megabytes.
raw_mb           := 400
heldout_mb       := 4
labels           := 5000
textbooks        := 16000
exercises        := 400000
exercise_options := --concepts
heldout          := 500
unseen           := 200
# As in small.toml and large.toml.
vocab_size       := 16384
tokenizer_mb     := 16
val_frac         := 0.01

max_new_tokens   := 256
robustness_limit := 100
