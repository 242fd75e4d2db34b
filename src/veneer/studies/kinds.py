"""The studies by name."""

from __future__ import annotations

from veneer.studies.budget import BudgetStudy
from veneer.studies.learning_rate import LearningRateStudy
from veneer.studies.matrices import MatricesStudy
from veneer.studies.methods import MethodsStudy
from veneer.studies.rank import RankStudy
from veneer.studies.spectrum import SpectrumStudy
from veneer.studies.storage import StorageStudy
from veneer.studies.study import Study

STUDIES: dict[str, type[Study]] = {
    study.name: study
    for study in (
        LearningRateStudy, RankStudy, MatricesStudy, MethodsStudy, StorageStudy, BudgetStudy, SpectrumStudy,
    )
}  # fmt: skip
