"""ResNet-20 as a checkpoint, and a small ViT with random weights: `python prepare.py FOLDER DATA`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "vit-cifar10"))
from make_model import make_model

folder, data = map(Path, sys.argv[1:])
resnet = folder / "resnet20"
resnet.mkdir()
shutil.copyfile(data / "models" / "resnet-cifar10" / "resnet20.safetensors", resnet / "model.safetensors")
(resnet / "config.json").write_text(json.dumps({"model_type": "cifar-resnet", "depth": 20}), encoding="utf-8")
make_model(folder / "vit")
