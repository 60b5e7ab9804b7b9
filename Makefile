# make demo: set up, and ask two trained LLaVAs, unpruned and pruned.  make test: all tests, on three
# releases of transformers, in lmms-eval and under DeepSpeed.  make docs: the site, in site/.  Set PYTHON to choose the interpreter (3.10
# or newer).
PYTHON ?= python3
TORCH ?= 2.13.0
OLD := 4.37.2
MIDDLE := 4.57.6
NEW := 5.23.0
LMMS := 0.7.3
DEEPSPEED := 0.19.8
VENVS := .venvs
# Without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu spares 5 GB of CUDA.
TORCH_INDEX ?=
PIP_INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Threads that spin while they wait bring a busy machine to a crawl: a first token of 0.2 s took
# 2.6 s beside another process.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-lmms test-deepspeed lint docs pictures bench clean

demo: $(VENVS)/$(MIDDLE)/ready
	$(VENVS)/$(MIDDLE)/bin/python examples/demo.py --out demo-out

test: test-$(OLD) test-$(MIDDLE) test-$(NEW) test-lmms test-deepspeed

# On the older releases, what touches a host; what is pure, or about files and pages, on the newest.
NEWEST_ONLY := accuracy answers choice config context demo_app docs eval_checkpoint eval_scores \
	eval_scripts examples extras fit flops given golden golden_merging golden_vision greedy hf_sequence \
	inside_commands inside_config inside_methods layering masks merging methods naming nodes own_method \
	protocol pth ranking record shapes_training show show_merging show_page tables tiling_commands tour \
	transfers tuned vision_methods wheel
test-%: $(VENVS)/%/ready
	$(VENVS)/$*/bin/python -m pytest -q --numprocesses auto --dist loadfile \
		$(if $(filter-out $(NEW),$*),$(NEWEST_ONLY:%=--ignore=tests/test_%.py))

# The model that lmms-eval finds; lmms-eval brings a hundred packages, so it has its own environment.
test-lmms: $(VENVS)/lmms/ready
	$(VENVS)/lmms/bin/python -m pytest -q tests/test_lmms.py

# Two ranks on the CPU. DeepSpeed is in no other environment: with it transformers takes other paths.
test-deepspeed: $(VENVS)/deepspeed/ready
	$(VENVS)/deepspeed/bin/python -m pytest -q tests/test_deepspeed*.py

lint: $(VENVS)/$(NEW)/ready
	$(VENVS)/$(NEW)/bin/ruff check .
	$(VENVS)/$(NEW)/bin/ruff format --check .
	$(VENVS)/$(NEW)/bin/mypy llava_hvp startup examples eval_scripts training

# The site reads the sources and imports nothing, so its environment has neither torch nor LLaVA.
docs: $(VENVS)/docs/ready
	NO_MKDOCS_2_WARNING=1 $(VENVS)/docs/bin/mkdocs build --strict --quiet

# Every picture in docs/, and the plots from their results.
pictures: $(VENVS)/$(NEW)/ready
	$(VENVS)/$(NEW)/bin/python examples/pictures.py

bench: $(VENVS)/$(NEW)/ready
	$(VENVS)/$(NEW)/bin/llava-hvp bench --geometry llava-1.5-160m --r-max 0.5,0.25 --rounds 5 \
		--new-tokens 16 --out bench-out

# One environment for each transformers release. LLaVA goes in without its dependencies, whose pins
# no current machine can meet; the extra `host` names what it imports. The newest peft does not
# import beside the oldest transformers.
$(VENVS)/%/ready: pyproject.toml Makefile $(wildcard startup/*)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.11") if sys.version_info < (3, 10) else None'
	@echo "Setting up $(VENVS)/$*: torch, transformers $* and LLaVA are downloaded, once, in some minutes"
	$(PYTHON) -m venv $(VENVS)/$*
	$(VENVS)/$*/bin/python -m pip install $(PIP_INDEX) torch==$(TORCH) transformers==$* -e '.[dev]' \
		$(if $(filter $(OLD),$*),'peft<0.9') $(if $(filter $(NEW),$*),'gradio>=6' ipykernel nbclient)
	$(VENVS)/$*/bin/python -m pip install --no-deps llava-torch==1.2.2.post1
	touch $@

# torch is named in the same call, or lmms-eval takes the build for CUDA. Its torchvision and timm
# do not import beside a torch for the CPU, and its protobuf is too old for sentencepiece.
$(VENVS)/lmms/ready: pyproject.toml Makefile $(wildcard startup/*)
	$(PYTHON) -m venv $(VENVS)/lmms
	$(VENVS)/lmms/bin/python -m pip install --quiet torch==$(TORCH) lmms-eval==$(LMMS) \
		-e '.[host,testing]' pytest scikit-image
	$(VENVS)/lmms/bin/python -m pip uninstall --quiet --yes torchvision timm
	$(VENVS)/lmms/bin/python -m pip install --quiet --no-deps llava-torch==1.2.2.post1 'protobuf>=7.36.1'
	touch $@

# torch is named in the same call, or DeepSpeed takes the build for CUDA.
$(VENVS)/deepspeed/ready: pyproject.toml Makefile $(wildcard startup/*)
	$(PYTHON) -m venv $(VENVS)/deepspeed
	$(VENVS)/deepspeed/bin/python -m pip install --quiet torch==$(TORCH) transformers==$(MIDDLE) \
		deepspeed==$(DEEPSPEED) -e '.[deepspeed,host,testing]' pytest scikit-image
	$(VENVS)/deepspeed/bin/python -m pip install --quiet --no-deps llava-torch==1.2.2.post1
	touch $@

# A rule of its own stands before the pattern's: this environment needs the packages of one extra only.
$(VENVS)/docs/ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENVS)/docs
	$(VENVS)/docs/bin/python -m pip install --quiet 'mkdocs-material>=9.5,<10' 'mkdocstrings[python]>=0.27'
	touch $@

.PRECIOUS: $(VENVS)/%/ready

clean:
	rm -rf $(VENVS) demo-out bench-out site
