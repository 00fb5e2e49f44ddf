VENV ?= .venv
PYTHON := $(VENV)/bin/python
DEMO := out/demo
# What the demo trains: 32 px, no downloads. The random ViT stands in for DINOv2: its features mean nothing.
FROZEN := --codec pixels --pixels_factor 4 --image_size 32 --encoder vit_tiny_patch16_224 --weights random \
	--layers 3 7 11 --encoder_size 64 --val_fraction 0.0625 --precision fp32
SMALL := --width 64 --channel_mult 1 2 --res_blocks 1 --attention 1 2 --heads 4 --context_dim 128

.PHONY: demo ablation test clean

# On a fresh machine, a CPU, no downloads beyond pip: shapes -> archive -> train -> sample -> evaluate; 8 min on two cores.
demo: $(VENV)/demo
	test -e $(DEMO)/data || { rm -rf $(DEMO)/data.part && \
		$(PYTHON) -m tools.shapes --out $(DEMO)/data.part --objects 768 --views 12 --size 32 --plain && mv $(DEMO)/data.part $(DEMO)/data; }
	$(PYTHON) precompute_dino.py --data $(DEMO)/data --archive $(DEMO)/archive $(FROZEN) --workers 1
	$(PYTHON) train.py --archive $(DEMO)/archive --out $(DEMO) $(SMALL) --prediction x0 --t_sampling uniform \
		--steps 1200 --batch_size 32 --accumulate 1 --lr 2e-3 --lr_min 1e-5 --cc_lr 3 --warmup 100 --ema 0.997 \
		--precision fp32 --log_every 50 --val_every 400 --val_pairs 32 --preview_every 0 --save_every 400 --workers 1
	$(PYTHON) sample.py --ckpt $(DEMO) --image $(DEMO)/data/00767/000.png --no-crop --orbit 12 --steps 10 --scale 2 \
		--out $(DEMO)/views
	cp $(DEMO)/views/000/orbit.gif $(DEMO)/orbit.gif
	$(PYTHON) evaluate.py --ckpt $(DEMO) --data $(DEMO)/data --shuffled --pairs 128 --steps 10 --scale 2 --lpips none \
		--workers 1 --grid $(DEMO)/samples.png --out $(DEMO)/eval.jsonl
	$(PYTHON) visualize.py curves $(DEMO) --out $(DEMO)/loss
	@echo "look at: $(DEMO)/samples.png $(DEMO)/orbit.gif $(DEMO)/loss.png $(DEMO)/log.jsonl"

# Table 1's and figure 6's ablations at a size that a CPU can take; the script says how to make them larger.
ablation: $(VENV)/demo
	PYTHON=$(PYTHON) studies/ablation.sh

# What CI runs: ruff and pytest, in a virtual environment.
test: $(VENV)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PYTHON) -m pytest -q -n auto --dist loadfile tests

$(VENV)/demo: requirements.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install -q -r requirements.txt
	touch $@

$(VENV)/test: tests/requirements.txt $(VENV)/demo
	$(VENV)/bin/pip install -q -r tests/requirements.txt
	touch $@

clean:
	rm -rf $(DEMO)
