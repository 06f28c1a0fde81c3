"""A project file, validated, and the factories that it names."""

from lsa.project.project import (
    ALONG,
    DEFAULT,
    Augment,
    Named,
    Project,
    Recipe,
    Split,
    Train,
    check_along,
    first_rule,
    folders,
    load,
    resolve,
    train_params,
    trusted_by,
)

__all__ = [
    "ALONG",
    "DEFAULT",
    "Augment",
    "Named",
    "Project",
    "Recipe",
    "Split",
    "Train",
    "check_along",
    "first_rule",
    "folders",
    "load",
    "resolve",
    "train_params",
    "trusted_by",
]
