# nanophi: `make train` runs the whole pipeline in miniature, `make help` lists all targets.
#
# Every stage writes its own folder under $(OUT), with summary.json, its make target, last. A stage
# reruns only if its data, a setting, or a file that its program imports has changed.

SHELL  := /bin/bash
OUT    ?= out/demo
# PYTHON=python3 uses that interpreter and installs nothing.
PYTHON ?= .venv/bin/python
VENV   := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/installed)

# Put waiting threads to sleep after about 10 us of spinning: a tenth slower on an idle machine, but
# next to a busy program, two spinning threads were 3 to 20 times slower (LOG.md, 2026-11-22).
export GOMP_SPINCOUNT ?= 2000

# Sizes of the demo. A step is 1,024 tokens of filtered code, then of exercises or a control.
RAW_MB         ?= 20
EXERCISES      ?= 15000
HELDOUT        ?= 500
BASE_STEPS     ?= 100
FINETUNE_STEPS ?= 700
# Sandbox for the model's programs: the best one available. SANDBOX=C uses resource limits only, for
# machines without bubblewrap and Landlock; the programs come from a model trained on your own data.
SANDBOX        ?= auto
GPU_OUT        ?= out/gpu

.DEFAULT_GOAL := help
.PHONY: help train test check resources gpu-check gpu-bench gpu-tune lint clean \
        raw filtered exercises pairs tokenizer tokens pretrain finetune eval
.DELETE_ON_ERROR:
.PRECIOUS: $(OUT)/tokens/%/summary.json $(OUT)/eval/%/results.json

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo; echo "Settings, e.g. make train BASE_STEPS=100:"
	@$(foreach v,OUT PYTHON RAW_MB EXERCISES HELDOUT BASE_STEPS FINETUNE_STEPS SANDBOX,echo "  $v=$($v)";)

train: $(OUT)/report.html  ## run everything, raw code to evaluated model and report; start here

PYTEST = $(PYTHON) -m pytest \
  $$($(PYTHON) -c 'import xdist' 2>&- && echo --numprocesses=2 --dist=loadfile)

test: $(VENV)  ## test the core, the kernels and one pass of every stage: 3 minutes
	$(PYTEST) -m 'not slow' tests/core tests/kernels tests/test_stages.py

check: $(VENV)  ## run every test and every command of README.md and docs/: 10 minutes
	$(PYTEST)

lint: $(VENV)  ## run ruff
	$(PYTHON) -m ruff check .

resources: $(VENV)  ## compile the default kernels for sm_80 and sm_90; fail on spills or slowdowns
	$(PYTHON) -m bench.resources --defaults

gpu-check:  ## test the kernels and train.py on a GPU: 3 minutes; all gpu-* use your own python3
gpu-bench:  ## benchmark training steps, ops and decoding against peers on a GPU: 10 minutes
gpu-tune:  ## tune the kernels on a GPU: 7 minutes; all three write to GPU_OUT (out/gpu)
gpu-check gpu-bench gpu-tune:
	python3 -m bench.gpu --do=$(@:gpu-%=%) --out=$(GPU_OUT)

clean:  ## delete all outputs (out/), but not .venv
	rm -rf out

.venv/installed: requirements.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "error: python3 is %d.%d; nanophi needs 3.11 or newer" % sys.version_info[:2] or 0)'
	python3 -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	@touch $@

# $(call set,X Y): one file per setting, named after its value: a new value makes a new file.
set = $(foreach x,$(1),$(OUT)/.settings/$(x)@$($(x)))
$(OUT)/.settings/%:
	@mkdir -p $(@D) && rm -f $(firstword $(subst @, ,$@))@* && touch $@

# $(call code,X): program X and all files it imports, directly or indirectly.
CODE := $(shell $(if $(shell command -v $(PYTHON)),$(PYTHON),python3) -m common.code data.collect data.filter data.exercises \
          experiments.pairs tokenizer.train data.pack train eval.humaneval tools.report)
$(if $(CODE),,$(warning common.code failed: code changes will not trigger a rebuild))
code = $(patsubst $(1):%,%,$(filter $(1):%,$(CODE)))

raw:       $(OUT)/raw/summary.json             ## collect real code from this machine
filtered:  $(OUT)/filtered/summary.json        ## keep the educational code
pairs:     $(OUT)/pairs/summary.json           ## cut docstring/function pairs from raw code (control)
exercises: $(OUT)/exercises/summary.json       ## generate exercises with checked solutions
tokenizer: $(OUT)/tokenizer/summary.json       ## train the tokenizer
tokens:    $(foreach x,filtered exercises pairs,$(OUT)/tokens/$(x)/summary.json)  ## write token shards
pretrain:  $(OUT)/runs/base/summary.json       ## train the base model on filtered code
finetune:  $(OUT)/runs/exercises/summary.json  ## finetune it on exercises
eval:      $(OUT)/eval/exercises/results.json  ## score the finetuned model on held-out exercises

$(OUT)/raw/summary.json: $(call code,data.collect) $(call set,RAW_MB) | $(VENV)
	$(PYTHON) -m data.collect --out $(@D) --max_mb $(RAW_MB)

$(OUT)/filtered/summary.json: $(OUT)/raw/summary.json $(call code,data.filter)
	$(PYTHON) -m data.filter --source $(OUT)/raw --out $(@D)

$(OUT)/pairs/summary.json: $(OUT)/raw/summary.json $(call code,experiments.pairs)
	$(PYTHON) -m experiments.pairs --source $(OUT)/raw --out $(@D)

$(OUT)/exercises/summary.json $(OUT)/shuffled/summary.json: $(OUT)/%/summary.json: \
    $(call code,data.exercises) $(call set,EXERCISES HELDOUT) | $(VENV)
	$(PYTHON) -m data.exercises --out $(@D) --count $(EXERCISES) \
	  --heldout $(HELDOUT) $(if $(filter shuffled,$*),--shuffle_docstrings)

$(OUT)/tokenizer/summary.json: $(OUT)/filtered/summary.json $(OUT)/exercises/summary.json \
    $(call code,tokenizer.train)
	$(PYTHON) -m tokenizer.train --out $(@D) --source $(OUT)/filtered --source $(OUT)/exercises/train

$(OUT)/tokens/%/summary.json: $(OUT)/%/summary.json $(OUT)/tokenizer/summary.json $(call code,data.pack)
	$(PYTHON) -m data.pack --source $(OUT)/$*$(if $(filter exercises shuffled,$*),/train) \
	  --tokenizer $(OUT)/tokenizer --out $(@D) --val_frac 0.05

# $(call run,NAME,TOKENS,STEPS,INIT): train on tokens/TOKENS, starting from runs/INIT if given.
define run
$(OUT)/runs/$(1)/summary.json: $(OUT)/tokens/$(2)/summary.json \
    $(if $(4),$(OUT)/runs/$(4)/summary.json) configs/demo.toml $(call code,train) $(call set,$(3))
	$(PYTHON) train.py configs/demo.toml --out $(OUT)/runs/$(1) --resume --restart \
	  --data $(OUT)/tokens/$(2) --max_steps $($(3)) $(if $(4),--init_from $(OUT)/runs/$(4))
endef
$(eval $(call run,base,filtered,BASE_STEPS))
$(eval $(call run,exercises,exercises,FINETUNE_STEPS,base))
$(eval $(call run,pairs,pairs,FINETUNE_STEPS,base))

$(OUT)/eval/%/results.json: $(OUT)/runs/%/summary.json $(call code,eval.humaneval)
	$(PYTHON) -m eval.humaneval --checkpoint $(OUT)/runs/$* \
	  --problems $(OUT)/exercises/heldout.jsonl --out $(@D) --max_new_tokens 128 --sandbox $(SANDBOX)

results = $(foreach x,$(1),$(OUT)/eval/$(x)/results.json)
$(OUT)/report.html: $(call results,exercises pairs) $(call code,tools.report)
	$(PYTHON) -m tools.report --demo $(OUT)

include experiments/demo_full.mk experiments/ladder.mk experiments/best.mk
