# nanophi. `make train` is the whole job in miniature, `make test` the tests, `make help` the rest.
#
# Every stage writes a folder of its own under $(OUT), with a summary.json that stands last; that
# file is the stage's target here, so that a stage runs again only when what it reads has changed.
# PYTHON=python3 uses that interpreter and installs nothing.

SHELL  := /bin/bash
OUT    ?= out/demo
PYTHON ?= .venv/bin/python
VENV   := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/installed)

# Threads that wait sleep after about 10 us rather than spin: a tenth slower on an idle machine, but
# beside another busy program two spinning threads were 3 to 20 times slower (LOG.md, 2026-11-22).
export GOMP_SPINCOUNT ?= 2000

# The demo's sizes. Steps are of 512 tokens: filtered code first, then exercises or a control.
RAW_MB         ?= 40
EXERCISES      ?= 30000
HELDOUT        ?= 500
BASE_STEPS     ?= 400
FINETUNE_STEPS ?= 3200

# Where the model's programs run: the best sandbox that is here. SANDBOX=C runs them with limits
# alone, where there is neither bubblewrap nor Landlock; they are of a model trained on your own data.
SANDBOX        ?= auto
TOTAL_STEPS    := $(shell echo $$(($(BASE_STEPS) + $(FINETUNE_STEPS))))

# A stage is made again when a setting that it uses changes: each value has a file, made when new.
set = $(foreach x,$(1),$(OUT)/.settings/$(x)@$($(x)))

.DEFAULT_GOAL := help
.PHONY: help train demo-full ladder report best test resources gpu-check gpu-bench gpu-tune lint clean \
        raw filtered exercises pairs tokenizer tokens pretrain finetune eval
.DELETE_ON_ERROR:
.PRECIOUS: $(OUT)/tokens/%/summary.json $(OUT)/runs/%/summary.json $(OUT)/eval/%/results.json

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo; echo "Settings, as in make train BASE_STEPS=100:"
	@$(foreach v,OUT PYTHON RAW_MB EXERCISES HELDOUT BASE_STEPS FINETUNE_STEPS SANDBOX,echo "  $v=$($v)";)

train: $(OUT)/report.html  ## raw code -> evaluated model and report; start here

test: $(VENV)  ## run the tests
	$(PYTHON) -m pytest $$($(PYTHON) -c 'import xdist' 2>&- && echo --numprocesses=2 --dist=loadfile)

lint: $(VENV)  ## check the style
	$(PYTHON) -m ruff check .

resources: $(VENV)  ## compile every default kernel for sm_80 and sm_90; fails if one spills or gets slower
	$(PYTHON) -m bench.resources --defaults

gpu-check:  ## on a GPU, with your own python3, 3 minutes: is each kernel right, does train.py run
gpu-bench:  ## likewise, 9 minutes: training steps, ops and decoding beside their peers
gpu-tune:  ## likewise, 7 minutes: the fastest configurations, to GPU_OUT (out/gpu) like all of it

GPU_OUT ?= out/gpu

gpu-check gpu-bench gpu-tune:
	python3 -m bench.gpu --do=$(@:gpu-%=%) --out=$(GPU_OUT)

clean:  ## delete what the stages wrote (out/), not .venv
	rm -rf out

.venv/installed: requirements.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "error: python3 is %d.%d; nanophi needs 3.11 or newer" % sys.version_info[:2] or 0)'
	python3 -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	@touch $@

$(call set,RAW_MB EXERCISES HELDOUT BASE_STEPS FINETUNE_STEPS TOTAL_STEPS):
	@mkdir -p $(@D) && rm -f $(firstword $(subst @, ,$@))@* && touch $@

# ---- data ----

raw:       $(OUT)/raw/summary.json        ## collect real code from this machine
filtered:  $(OUT)/filtered/summary.json   ## keep what teaches
pairs:     $(OUT)/pairs/summary.json      ## docstring/function pairs cut from raw code (a control)
exercises: $(OUT)/exercises/summary.json  ## make exercises with checked solutions
tokenizer: $(OUT)/tokenizer/summary.json  ## train the tokenizer

LAYER := $(addprefix data/base/,documents.py lineage.py ranks.py readers.py stage.py)

$(OUT)/raw/summary.json: data/collect.py $(LAYER) $(call set,RAW_MB) | $(VENV)
	$(PYTHON) -m data.collect --out $(@D) --max_mb $(RAW_MB)

$(OUT)/filtered/summary.json: data/filter.py $(LAYER) $(OUT)/raw/summary.json
	$(PYTHON) -m data.filter --source $(OUT)/raw --out $(@D)

$(OUT)/pairs/summary.json: data/pairs.py $(LAYER) $(OUT)/raw/summary.json
	$(PYTHON) -m data.pairs --source $(OUT)/raw --out $(@D)

$(OUT)/exercises/summary.json: data/exercises.py data/synthetic/forms.py data/synthetic/damage.py data/synthetic/families.py \
    data/base/documents.py $(call set,EXERCISES HELDOUT) | $(VENV)
	$(PYTHON) -m data.exercises --out $(@D) --count $(EXERCISES) --heldout $(HELDOUT)

$(OUT)/shuffled/summary.json: data/exercises.py data/synthetic/forms.py data/synthetic/damage.py data/synthetic/families.py \
    data/base/documents.py $(call set,EXERCISES HELDOUT) | $(VENV)
	$(PYTHON) -m data.exercises --out $(@D) --count $(EXERCISES) --heldout $(HELDOUT) \
	  --shuffle_docstrings

$(OUT)/tokenizer/summary.json: tokenizer/train.py tokenizer/__init__.py \
    $(OUT)/filtered/summary.json $(OUT)/exercises/summary.json
	$(PYTHON) -m tokenizer.train --out $(@D) --source $(OUT)/filtered --source $(OUT)/exercises/train

# ---- token shards: $(OUT)/tokens/X from the documents of X ----

tokens: $(foreach x,filtered exercises pairs,$(OUT)/tokens/$(x)/summary.json)  ## write token shards

documents = $(OUT)/$(if $(filter exercises shuffled,$(1)),$(1)/train,$(1))

$(OUT)/tokens/%/summary.json: $(OUT)/%/summary.json $(OUT)/tokenizer/summary.json data/pack.py \
    data/shards.py $(LAYER)
	$(PYTHON) -m data.pack --source $(call documents,$*) --tokenizer $(OUT)/tokenizer --out $(@D) \
	  --val_frac 0.05

# ---- training: runs/base on filtered code, then runs/X from it on the tokens of X ----

CODE  := train.py common/distributed.py common/runlog.py model.py common/checkpoint.py data/loader.py configs/demo.toml
TRAIN  = $(PYTHON) train.py configs/demo.toml --out $(@D) --resume --restart

pretrain: $(OUT)/runs/base/summary.json       ## train the base model on filtered code
finetune: $(OUT)/runs/exercises/summary.json  ## finetune it on exercises

$(OUT)/runs/base/summary.json: $(OUT)/tokens/filtered/summary.json $(CODE) \
    $(call set,BASE_STEPS)
	$(TRAIN) --data $(OUT)/tokens/filtered --max_steps $(BASE_STEPS)

$(OUT)/runs/%/summary.json: $(OUT)/tokens/%/summary.json $(OUT)/runs/base/summary.json $(CODE) \
    $(call set,FINETUNE_STEPS)
	$(TRAIN) --data $(OUT)/tokens/$* --init_from $(OUT)/runs/base --max_steps $(FINETUNE_STEPS)

# Arms of `make demo-full` that do not start from runs/base.
$(OUT)/runs/raw/summary.json $(OUT)/runs/filtered/summary.json: \
    $(OUT)/runs/%/summary.json: $(OUT)/tokens/%/summary.json $(CODE) $(call set,TOTAL_STEPS)
	$(TRAIN) --data $(OUT)/tokens/$* --max_steps $(TOTAL_STEPS)

$(OUT)/runs/raw_base/summary.json: $(OUT)/tokens/raw/summary.json $(CODE) $(call set,BASE_STEPS)
	$(TRAIN) --data $(OUT)/tokens/raw --max_steps $(BASE_STEPS)

$(OUT)/runs/raw_exercises/summary.json: $(OUT)/tokens/exercises/summary.json \
    $(OUT)/runs/raw_base/summary.json $(CODE) $(call set,FINETUNE_STEPS)
	$(TRAIN) --data $(OUT)/tokens/exercises --init_from $(OUT)/runs/raw_base \
	  --max_steps $(FINETUNE_STEPS)

# ---- evaluation: eval/X from runs/X, then the report of every arm that has been scored ----

eval: $(OUT)/eval/exercises/results.json  ## score the finetuned model on held-out exercises

$(OUT)/eval/%/results.json: $(OUT)/runs/%/summary.json sample.py $(wildcard eval/*.py)
	$(PYTHON) -m eval.exercises --checkpoint $(OUT)/runs/$* \
	  --problems $(OUT)/exercises/heldout.jsonl --out $(@D) --max_new_tokens 128 --sandbox $(SANDBOX)

results = $(foreach x,$(1),$(OUT)/eval/$(x)/results.json)

$(OUT)/report.html: tools/report.py common/pages.py $(call results,exercises pairs)
	$(PYTHON) -m tools.report --demo $(OUT)

demo-full: $(call results,exercises pairs shuffled raw filtered raw_exercises)  ## every arm (longer)
	$(PYTHON) -m tools.report --demo $(OUT)

# ---- the ladder: the same model on better and better data. HUMANEVAL= and MBPP= name files of yours

HUMANEVAL ?=
MBPP      ?=
LADDER    ?= out/ladder

ladder: $(VENV)  ## the same model on better and better data, and its report (80 minutes)
	$(PYTHON) -m experiments.ladder experiments/ladder_cpu --out $(LADDER) --sandbox $(SANDBOX) \
	  $(if $(HUMANEVAL),--humaneval $(HUMANEVAL)) $(if $(MBPP),--mbpp $(MBPP))
	$(MAKE) report

report: $(VENV)  ## the ladder's report again: a page, and figures under records/
	$(PYTHON) -m tools.report --ladder $(LADDER) --png records/ladder_cpu

# ---- the best score of about an hour on two CPU cores (LOG.md): exercises in many forms, textbooks
# and filtered code, without whatever is like a benchmark's problem, in one pass

BEST := out/best
BENCHMARKS = --benchmarks $(HUMANEVAL) --benchmarks $(MBPP)

best: $(BEST)/humaneval/results.json $(BEST)/mbpp/results.json  ## the best score of an hour (HUMANEVAL= MBPP=)

$(BEST)/data/summary.json: | $(VENV)
	@[ -f "$(HUMANEVAL)" -a -f "$(MBPP)" ] || { echo >&2 \
	  "error: make best HUMANEVAL=HumanEval.jsonl.gz MBPP=mbpp.jsonl wants both files"; exit 2; }
	$(PYTHON) -m data.exercises --out $(@D)/exercises --forms varied --concepts --count 120000 \
	  --unseen 200 $(BENCHMARKS)
	$(PYTHON) -m data.synthesize textbooks --out $(@D)/textbooks --count 4000
	$(PYTHON) -m data.collect --out $(@D)/raw --max_mb 40
	$(PYTHON) -m data.filter --source $(@D)/raw --out $(@D)/filtered
	for x in exercises/train textbooks filtered; do $(PYTHON) -m data.decontaminate --tau 0.8 \
	  --source $(@D)/$$x --out $(@D)/clean/$$x $(BENCHMARKS) || exit; done
	$(PYTHON) -m tokenizer.train --source $(@D)/clean/exercises/train --out $(@D)/tokenizer \
	  --source $(@D)/clean/textbooks --source $(@D)/clean/filtered --vocab_size 3072
	$(PYTHON) -m data.pack --tokenizer $(@D)/tokenizer --out $(BEST)/tokens --val_frac 0.01 \
	  --source $(@D)/clean/exercises/train --epochs 1 --source $(@D)/clean/textbooks --epochs 1 \
	  --source $(@D)/clean/filtered --epochs 0.5
	cp $(BEST)/tokens/summary.json $@

$(BEST)/run/summary.json: $(BEST)/data/summary.json experiments/best_cpu.toml
	$(PYTHON) train.py experiments/best_cpu.toml --resume --restart

$(BEST)/humaneval/results.json: $(BEST)/run/summary.json
	$(PYTHON) -m eval.humaneval --problems $(HUMANEVAL) --checkpoint $(<D) --out $(@D) \
	  --sandbox $(SANDBOX)

$(BEST)/mbpp/results.json: $(BEST)/run/summary.json
	$(PYTHON) -m eval.mbpp --problems $(MBPP) --protocol docstring --checkpoint $(<D) --out $(@D) \
	  --sandbox $(SANDBOX)
