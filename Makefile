VENV ?= .venv
PYTHON := $(VENV)/bin/python
DEMO := out/demo
# What the demo trains: 32 px, no downloads. The random ViT stands for DINOv2: its features mean nothing.
FROZEN := --codec pixels --image_size 32 --encoder vit_tiny_patch16_224 --weights random --layers 3 7 11 \
	--encoder_size 64 --val_fraction 0.05 --precision fp32
SMALL := --width 64 --channel_mult 1 2 --res_blocks 1 --attention 1 2 --heads 4 --context_dim 128

.PHONY: demo test clean

# On a fresh machine, a CPU, no downloads beyond pip: shapes -> archive -> train -> sample -> evaluate; about 10 minutes.
demo: $(VENV)/demo
	$(PYTHON) data.py shapes --out $(DEMO)/data --objects 640 --views 12 --size 32
	$(PYTHON) precompute_dino.py --data $(DEMO)/data --archive $(DEMO)/archive $(FROZEN)
	$(PYTHON) train.py --archive $(DEMO)/archive --out $(DEMO) $(SMALL) --prediction v --t_sampling uniform \
		--steps 1000 --batch_size 32 --accumulate 1 --lr 1e-3 --lr_min 1e-5 --warmup 100 --ema 0.995 \
		--precision fp32 --val_every 250 --preview_every 500 --save_every 250 --workers 1
	$(PYTHON) sample.py --ckpt $(DEMO) --image $(DEMO)/data/00639/000.png --no-crop --orbit 12 --scale 1 --out $(DEMO)/views
	cp $(DEMO)/views/000/orbit.gif $(DEMO)/orbit.gif
	$(PYTHON) evaluate.py --ckpt $(DEMO) --data $(DEMO)/data --shuffled --scale 1 --steps 20 --lpips none \
		--grid $(DEMO)/samples.png --out $(DEMO)/eval.jsonl
	$(PYTHON) visualize.py curves $(DEMO) --out $(DEMO)/loss
	@echo "look at: $(DEMO)/samples.png $(DEMO)/orbit.gif $(DEMO)/loss.png $(DEMO)/log.jsonl"

# What CI runs: ruff and pytest in a virtual environment of their own.
test: $(VENV)/test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PYTHON) -m pytest -q tests

$(VENV)/demo: requirements.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install -q -r requirements.txt
	touch $@

$(VENV)/test: tests/requirements.txt $(VENV)/demo
	$(VENV)/bin/pip install -q -r tests/requirements.txt
	touch $@

clean:
	rm -rf $(DEMO)
