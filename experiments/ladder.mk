# The paper's Figure 2.1 in miniature: the same model on better and better data, bar by bar.
#
#   make -j2 ladder HUMANEVAL=... MBPP=...           make the data, train and score every bar
#   make ladder-list HUMANEVAL=... MBPP=...          list the commands left to run
#   make ladder BAR=raw-small-s0 LADDER=out/again    make one bar from scratch
#
# A bar is RUNG-SIZE-sSEED. LADDER_SET holds the list of bars, the settings, and SIZE.toml configs.
# A file is remade if a prerequisite is newer, or if its command (and so a setting) differs from the
# one in $(LADDER)/commands; code edits remake nothing. After a kill, the same command resumes, even
# inside a stage or a training run. With make -k, a failure skips only what depends on that file.

LADDER     ?= out/ladder
LADDER_SET ?= experiments/ladder_cpu
# Benchmark files. Without either, the pruned rungs are skipped.
HUMANEVAL  ?=
MBPP       ?=
benchmarks  = $(patsubst %,--benchmarks %,$(HUMANEVAL) $(MBPP))
ENCODER    ?=
FIGURES    ?= records/$(notdir $(LADDER_SET))
# A single bar to make, instead of all.
BAR        ?=

sources ?= stdlib site-packages
include $(LADDER_SET)/ladder.mk

# Train a direct rung on data/tokens/RUNG for base_steps + finetune_steps. Train a finetuned rung on
# textbooks for base_steps (run base, also a bar), then on tokens/RUNG for finetune_steps.
direct    := raw filtered classified textbooks mixture
finetuned := exercises replay varied blend damaged pairs pruned80

# $(call job,FILE,NEEDS,COMMAND): rule that makes FILE from the files NEEDS with COMMAND. (strip:
# make 4.3's $(file <) sometimes keeps the newline.)
record = $(LADDER)/commands/$(subst /,.,$(1:$(LADDER)/%=%))
define job
$(1): $(2) $(if $(subst x$(strip $(3))x,,x$(strip $(file <$(record)))x),again) | $(VENV)
	@mkdir -p $(LADDER)/commands $(LADDER)/rungs/$(bar)
	OMP_NUM_THREADS=$(threads) $(PYTHON) -m $(strip $(3))
	@echo '$(strip $(3))' >$(record)

endef
again:  # never exists, so files that need it are remade

# ---- Data: $(call data,NAME,NEEDS,COMMAND) is the rule that makes data/NAME from data/NEEDS

D := $(LADDER)/data
data = $(eval $(call job,$D/$(1)/summary.json,$(2:%=$D/%/summary.json),$(3) --out $D/$(1)))

$(call data,collected,,data.collect $(sources:%=--source %) --max_mb $(raw_mb))
$(call data,raw,collected,experiments.holdout --source $D/collected --heldout_mb $(heldout_mb))
$(call data,heldout_code,collected,experiments.holdout --source $D/collected --heldout_mb $(heldout_mb) \
  --keep heldout)
$(call data,filtered,raw,data.filter --source $D/raw)
$(call data,labels,raw,data.annotate --source $D/raw --labeller rules --sample $(labels))
# Features: hidden states of the Hugging Face model ENCODER (as in the paper), or syntax trees.
$(call data,forest,labels,data.classify train --source $D/labels --head forest \
  $(ENCODER:%=--encoder %))
$(call data,scored,raw forest,data.classify score --source $D/raw --forest $D/forest)
# The classifier alone decides, as in the paper.
$(call data,classified,scored,data.filter --source $D/scored --keep_frac 0.2 --rules=false)
$(call data,textbooks,,data.synthesize textbooks --count $(textbooks))
$(call data,pairs,raw,experiments.pairs --source $D/raw)

# --benchmarks: drop exercises that solve a benchmark problem.
exercise = data.exercises --count $(exercises) --heldout $(heldout) --unseen $(unseen) --concepts \
  $(benchmarks)
$(call data,exercises,,$(exercise))
$(call data,varied,,$(exercise) --forms varied)
$(call data,damaged,,$(exercise) --damage_frac 0.5)

taus := $(patsubst pruned%,%,$(filter pruned%,$(finetuned)))
# Drop exercises similar to a benchmark problem or a held-out exercise.
$(foreach tau,$(taus),$(call data,pruned$(tau),exercises,data.decontaminate --tau 0.$(tau) \
  --source $D/exercises/train --benchmarks $D/exercises/heldout.jsonl $(benchmarks)))

$(call data,tokenizer,raw textbooks exercises,tokenizer.train --source $D/raw \
  --source $D/textbooks --source $D/exercises/train --vocab_size $(vocab_size) \
  --max_mb $(tokenizer_mb) --threads $(threads))

# $(call pack,TOKENS,FOLDERS,OPTIONS): rule that packs data/FOLDERS into data/tokens/TOKENS.
pack = $(call data,tokens/$(1),tokenizer $(2:%/train=%),data.pack $(2:%=--source $D/%) \
  --tokenizer $D/tokenizer --val_frac $(or $(val_frac_$(1)),$(val_frac)) $(3) --threads $(threads))
$(foreach x,raw filtered classified pairs $(taus:%=pruned%),$(call pack,$(x),$(x)))
$(foreach x,exercises varied damaged,$(call pack,$(x),$(x)/train))
$(call pack,textbooks,classified textbooks,--weight 0.5 --weight 0.5)
$(call pack,replay,exercises/train classified,--weight 0.8 --weight 0.2)
$(call pack,blend,exercises/train varied/train,--weight 0.5 --weight 0.5)
$(call pack,mixture,exercises/train varied/train pairs classified textbooks,--weight 0.25 \
  --weight 0.25 --weight 0.2 --weight 0.2 --weight 0.1)

# ---- Runs

made := $(or $(BAR),$(bars))
$(if $(word 2,$(HUMANEVAL))$(word 2,$(MBPP)),$(error HUMANEVAL=, MBPP=: a path may have no spaces))
ifeq ($(strip $(HUMANEVAL)$(MBPP)),)  # nothing to prune against
$(if $(filter pruned%,$(BAR)),$(error $(BAR) needs HUMANEVAL= or MBPP= to prune against))
made := $(filter-out pruned%,$(made))
$(if $(filter ladder%,$(MAKECMDGOALS)),$(warning HUMANEVAL= and MBPP= are empty: the ladder will not \
  be scored on them, nor pruned))
endif
# $(call part,BAR,1, 2 or 3): its RUNG, SIZE or sSEED.
part   = $(word $(2),$(subst -, ,$(1)))
config = $(LADDER_SET)/$(call part,$(1),2).toml
known := $(direct) base $(finetuned)
$(foreach bar,$(made),$(if $(and $(filter $(call part,$(bar),1),$(known)),$(call part,$(bar),3),\
  $(wildcard $(call config,$(bar)))),,$(error $(bar) is no bar: want RUNG-SIZE-sSEED, RUNG one of \
  $(known), SIZE.toml in $(LADDER_SET))))

# $(call train,RUN,TOKENS,STEPS,INIT): rule that trains runs/RUN, from runs/INIT's weights if given.
R := $(LADDER)/runs
train = $(eval $(call job,$R/$(1)/summary.json,$(call config,$(1)) $D/tokens/$(2)/summary.json \
  $(4:%=$R/%/summary.json),train $(call config,$(1)) --out $R/$(1) --data $D/tokens/$(2) \
  --max_steps $(3) --seed $(patsubst s%,%,$(call part,$(1),3)) --threads $(threads) \
  $(4:%=--init_from $R/%) --resume --restart))
base  = base-$(call part,$(1),2)-$(call part,$(1),3)
both := $(shell echo $$(($(base_steps) + $(finetune_steps))))

$(foreach rung,$(direct),$(foreach run,$(filter $(rung)-%,$(made)),$(call \
  train,$(run),$(rung),$(both))))
$(foreach rung,$(finetuned),$(foreach run,$(filter $(rung)-%,$(made)),$(call \
  train,$(run),$(rung),$(finetune_steps),$(call base,$(run)))))
bases := $(foreach run,$(filter-out $(direct:%=%-%),$(made)),$(call base,$(run)))
$(foreach run,$(sort $(bases)),$(call train,$(run),textbooks,$(base_steps)))

# ---- Scores

scores :=
S = $(LADDER)/rungs/$(bar)
# Score every bar on the first `ranked` problems of each file, with mutants. The judge problems are
# ours and no data is made from them: use them for model selection; only report the benchmarks.
problems := heldout unseen judge $(HUMANEVAL:%=humaneval) $(MBPP:%=mbpp)
judge_file     := eval/judge.jsonl
heldout_file   := $D/exercises/heldout.jsonl
unseen_file    := $D/exercises/unseen.jsonl
humaneval_file := $(HUMANEVAL)
mbpp_file      := $(MBPP)
needs = $($(1)_file:$D/exercises/%.jsonl=$D/exercises/summary.json)
$(foreach x,$(problems),$(eval $(call job,$D/mutants/$(x).jsonl,$(call needs,$(x)),eval.mutants \
  --problems $($(x)_file) --limit $(or $(ranked_$(x)),$(ranked)) --sandbox $(SANDBOX) \
  --out $D/mutants/$(x).jsonl)))

# $(call score,FILE,NEEDS,COMMAND): rule that makes rungs/$(bar)/FILE.
score = $(eval scores += $S/$(1))$(eval $(call job,$S/$(1),$R/$(bar)/summary.json $(2),eval.$(3)))
define score_bar
$(call score,gold/documents.json,$D/heldout_code/summary.json $(problems:%=$D/mutants/%.jsonl),bits \
  --checkpoint $R/$(bar) --out $S/gold --source $D/heldout_code \
  $(problems:%=--problems $D/mutants/%.jsonl))
$(foreach x,$(asked),$(call score,$(x)/results.json,$(call needs,$(x)),$(or $(filter mbpp,$(x)),\
  humaneval) --problems $($(x)_file) --limit $(asked_limit) --max_new_tokens $(max_new_tokens) \
  --checkpoint $R/$(bar) --out $S/$(x) --workers $(threads) --sandbox $(SANDBOX) \
  --self_check $(LADDER)/self_check/$(x).json))
endef
$(eval $(foreach bar,$(made),$(score_bar)))

# ---- Targets

.PHONY: ladder ladder-list report
ladder: $(scores)  ## train the same model on better and better data, and report (hours)
report:  ## rewrite the ladder's report: a page, and figures in records/
ladder report: | $(VENV)
	$(PYTHON) -m tools.report --ladder $(LADDER) $(if $(BAR),,--png $(FIGURES)) \
	  $(if $(wildcard $(BEST)/*/results.json),--best $(BEST))

ladder-list:  ## list the ladder commands left to run
	@$(MAKE) --no-print-directory -n ladder | sed -n 's/^OMP_NUM_THREADS.* -m //p'
