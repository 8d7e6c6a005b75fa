"""The methods: five protocols (`protocols.py`) and, for each axis, the table of classes that fulfil them.

Their options are in `qcompress/schema/axes.py`, which needs no torch; a test holds the two tables together.
"""

from __future__ import annotations

from qcompress.training.methods.awq import Awq
from qcompress.training.methods.distillation import DistillationLoss
from qcompress.training.methods.ipq import QuantizeInTurn
from qcompress.training.methods.plain import (
    CalibrateOnly,
    NoRescaling,
    OneUpdate,
    TaskLossObjective,
    TrainEverything,
)
from qcompress.training.methods.quadapter import BlocksThenModel, Quadapter
from qcompress.training.methods.saq import SharpnessAwareUpdate
from qcompress.training.methods.smoothquant import SmoothQuant
from qcompress.training.methods.squat import AlternatingUpdate
from qcompress.training.methods.teacher_intervention import InterveneThenTrain, Intervention

ADAPTERS = {"none": NoRescaling, "quadapter": Quadapter, "smoothquant": SmoothQuant, "awq": Awq}
OBJECTIVES = {
    "task": TaskLossObjective,
    "distillation": DistillationLoss,
    "teacher-intervention": Intervention,
}
STEPPERS = {"plain": OneUpdate, "saq": SharpnessAwareUpdate, "squat": AlternatingUpdate}
SCHEDULES = {
    "calibrate": CalibrateOnly,
    "plain": TrainEverything,
    "blockwise-then-end-to-end": BlocksThenModel,
    "two-step": InterveneThenTrain,
    "staged": QuantizeInTurn,
}
