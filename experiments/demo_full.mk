# More demo runs: shuffled docstrings, and the same number of steps on raw or filtered code only.

TOTAL_STEPS := $(shell echo $$(($(BASE_STEPS) + $(FINETUNE_STEPS))))

.PHONY: demo-full

demo-full: $(call results,exercises pairs shuffled raw filtered raw_exercises)  ## every run (longer)
	$(PYTHON) -m tools.report --demo $(OUT)

$(eval $(call run,shuffled,shuffled,FINETUNE_STEPS,base))
$(eval $(call run,raw,raw,TOTAL_STEPS))
$(eval $(call run,filtered,filtered,TOTAL_STEPS))
$(eval $(call run,raw_base,raw,BASE_STEPS))
$(eval $(call run,raw_exercises,exercises,FINETUNE_STEPS,raw_base))
