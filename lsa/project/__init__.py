"""A project file, validated, and the factories that it names."""

from lsa.project.project import (
    DEFAULT,
    TRAJECTORY,
    Project,
    check_per_checkpoint,
    folders,
    form,
    load,
    own_modules,
    resolve,
    train_params,
    trusted_by,
)
from lsa.project.sections import (
    ELSEWHERE,
    Augment,
    Named,
    Recipe,
    Split,
    Train,
    first_rule,
    validated,
)

__all__ = [
    "DEFAULT",
    "ELSEWHERE",
    "TRAJECTORY",
    "Augment",
    "Named",
    "Project",
    "Recipe",
    "Split",
    "Train",
    "check_per_checkpoint",
    "first_rule",
    "folders",
    "form",
    "load",
    "own_modules",
    "resolve",
    "train_params",
    "trusted_by",
    "validated",
]
