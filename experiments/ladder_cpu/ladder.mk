# The ladder for two CPU cores: a bar is 500 steps of 1,024 tokens, 0.51M tokens.
rungs := raw filtered classified textbooks exercises replay varied blend damaged pairs mixture pruned80
bars := $(foreach s,s0 s1 s2,$(foreach r,$(rungs),$(r)-small-$(s)) \
  $(foreach r,raw mixture,$(r)-large-$(s)))
threads        := 1
base_steps     := 100
finetune_steps := 400

raw_mb         := 12
heldout_mb     := 0.3
labels         := 1000
textbooks      := 1000
exercises      := 20000
heldout        := 500
unseen         := 200
# Must match small.toml and large.toml.
vocab_size     := 2048
tokenizer_mb   := 4
val_frac       := 0.02
# These two have only some hundred documents.
val_frac_filtered   := 0.1
val_frac_classified := 0.1

# Problems to measure gold bits on. Models write no solutions (asked=heldout makes them): the eight
# seed-0 bars that saw functions under docstrings solved 0 of 150 held-out exercises.
ranked         := 200
ranked_heldout := 100
ranked_unseen  := 100
asked          :=
asked_limit    := 150
max_new_tokens := 128
