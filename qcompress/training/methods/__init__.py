"""QAT methods: for each axis of a method, the table of classes that implement its protocol (`protocols.py`).

Their options are in `qcompress/schema/axes.py`, which needs no torch; a test compares the two tables.
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
