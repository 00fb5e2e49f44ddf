VENV ?= .venv
PYTHON := $(VENV)/bin/python
DEMO := out/demo
.PHONY: demo ablation gpu test clean

# On a fresh machine, a CPU, nothing to download but Python packages. First an orbit from the weights
# that ship, then a model of your own: cars, archive, training, an orbit, scores.
# What it is not: no DINOv2 (a random ViT stands in, its features mean nothing), no VAE (squares of
# pixels), not the paper's timesteps and not its prediction (presets/small.txt).
demo: $(VENV)/demo
	$(PYTHON) sample.py --ckpt assets/cars.safetensors --image assets/car.png --no-crop --orbit 12 \
		--steps 20 --scale 2 --out $(DEMO)/shipped
	@echo "look at $(DEMO)/shipped/car/orbit.gif; now a model of your own, in about ten minutes"
	test -e $(DEMO)/data || $(PYTHON) -m tools.shapes --out $(DEMO)/data --objects 768 --seed 1
	$(PYTHON) precompute_dino.py @presets/frozen-small.txt --val_fraction 0.0625 \
		--data $(DEMO)/data --archive $(DEMO)/archive --workers 1
	$(PYTHON) train.py @presets/small.txt --archive $(DEMO)/archive --out $(DEMO) --steps 1200 \
		--ema 0.997 --val_every 400 --val_pairs 32 --preview_every 0 --save_every 400 --workers 1
	$(PYTHON) sample.py --ckpt $(DEMO) --image assets/car.png --no-crop --orbit 12 --steps 10 \
		--scale 2 --out $(DEMO)/views
	cp $(DEMO)/views/car/orbit.gif $(DEMO)/orbit.gif
	$(PYTHON) evaluate.py --ckpt assets/cars.safetensors $(DEMO) --data $(DEMO)/data \
		--val_fraction 0.0625 --shuffled --pairs 128 --steps 10 --scale 2 --lpips none --workers 1 \
		--grid $(DEMO)/samples.png --out $(DEMO)/eval.jsonl
	$(PYTHON) visualize.py curves $(DEMO) --out $(DEMO)/loss
	@echo "This was no DINOv2, no VAE and not the paper's timesteps: a small model from scratch."
	@echo "Ten minutes teach it colours and outlines. The weights that ship took 2.4 hours on one core."
	@echo "look at: $(DEMO)/shipped/car/orbit.gif $(DEMO)/orbit.gif $(DEMO)/samples.png $(DEMO)/loss.png"

# Table 1's and figure 6's ablations at a size that a CPU can take; the script says how to make them larger.
ablation: $(VENV)/demo
	PYTHON=$(PYTHON) studies/ablation.sh

# Everything that takes a GPU, in order of worth; the script says what.
gpu: $(VENV)/test
	$(PYTHON) -m tools.gpu_check

# What CI runs: ruff and pytest, in a virtual environment.
test: $(VENV)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PYTHON) -m pytest -q -n auto --maxprocesses 4 --dist loadfile tests

$(VENV)/demo: requirements.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install -q -r requirements.txt
	touch $@

$(VENV)/test: tests/requirements.txt $(VENV)/demo
	$(VENV)/bin/pip install -q -r tests/requirements.txt
	touch $@

clean:
	rm -rf $(DEMO)
