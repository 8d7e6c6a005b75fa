"""The methods: five protocols (`protocols.py`) and, for each axis, the table of classes that fulfil them.

Their options are in `qcompress/axes.py`, which needs no torch; a test holds the two tables together.
"""

from __future__ import annotations

from qcompress.methods.awq import Awq
from qcompress.methods.distillation import DistillationLoss
from qcompress.methods.ipq import QuantizeInTurn
from qcompress.methods.plain import (
    CalibrateOnly,
    NoRescaling,
    OneUpdate,
    TaskLossObjective,
    TrainEverything,
)
from qcompress.methods.quadapter import BlocksThenModel, Quadapter
from qcompress.methods.saq import SharpnessAwareUpdate
from qcompress.methods.smoothquant import SmoothQuant
from qcompress.methods.squat import AlternatingUpdate
from qcompress.methods.teacher_intervention import InterveneThenTrain, Intervention

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
